"""Commands as a user gives them, and what they print."""

from fastguard.commands.cli import main


def ckpt(capsys, *arguments):
    """Exit status, output and errors of `fastguard ckpt`."""
    status = main(["ckpt", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err
