"""Runs commands as a user does, and returns what they print."""

from fastguard.commands.cli import main


def ckpt(capsys, *arguments):
    """Exit status, output and errors of `fastguard ckpt`."""
    status = main(["ckpt", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err
