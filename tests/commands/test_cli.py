"""The `fastguard` command: subcommands, exit statuses, usage errors and optional packages."""

import os
import subprocess
import sys

import pytest

from fastguard import __version__
from fastguard.commands import cli, usage
from fastguard.commands.cli import COMMANDS, Command, main
from guardtest import require

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from fastguard.commands.cli import main
sys.exit(main({argv!r}))
"""


def without(names, argv, cwd):
    """Runs a command in a process in which some packages cannot be imported."""
    code = WITHOUT.format(names=set(names), argv=argv)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_without_a_command_the_help_is_printed_and_the_status_is_2(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["report", "--help"]], ids=" ".join)
def test_version_and_help_do_not_import_torch(argv, tmp_path):
    done = without(["torch"], argv, tmp_path)
    assert done.returncode == 0 and "fastguard" in done.stdout, done.stderr


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert command.name in printed
        assert command.help in " ".join(printed.split())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_own_help(command, capsys):
    assert main([command.name, "--help"]) == 0
    assert f"usage: fastguard {command.name}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastguard {__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["train"]) == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["env"], ["bench"], ["demo"], ["scan", "x.log"]], ids=" ".join)
def test_a_mistyped_option_shows_the_usage_of_its_command(argv, capsys):
    assert main([*argv, "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: fastguard {argv[0]} ")
    assert "unrecognized arguments: --no-such-option" in error


@pytest.mark.parametrize(
    "error, status, message",
    [
        (usage.UsageError("no such thing; do this"), 2, "fastguard fake: no such thing; do this\n"),
        (OSError(28, "No space left on device", "x.png"), 2, "No space left on device: 'x.png'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_of_a_command_becomes_one_line_and_an_exit_status(
    error, status, message, capsys, monkeypatch
):
    class Fake:
        """A command that fails."""

        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(args):
            raise error

    monkeypatch.setattr(cli, "COMMANDS", (Command("fake", "fails", "fake"),))
    monkeypatch.setitem(sys.modules, "fastguard.commands.fake", Fake)
    assert main(["fake"]) == status
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_an_internal_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("fastguard.commands.environment.run", lambda args: [][0])
    with pytest.raises(IndexError):
        main(["env"])


def test_python_m_fastguard_runs_the_same_command(tmp_path):
    command = [sys.executable, "-m", "fastguard", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fastguard {__version__}\n")


def test_a_closed_pipe_is_not_an_error(tmp_path):
    command = f"{sys.executable} -m fastguard env | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("fastguard ") and done.stderr == ""


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_demo_names_the_missing_extra(missing, tmp_path):
    done = without([missing], ["demo", "--steps", "20", "--out", "out"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"fastguard demo: No module named '{missing}'; run: pip install 'torch-fastguard[cli]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_env_needs_torch_and_numpy_only(tmp_path):
    optional = ["rich", "matplotlib", "triton", "tensorboard", "yaml", "transformers", "lightning"]
    done = without(optional, ["env"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "backend: torch" in done.stdout


def test_a_usage_error_is_one_printable_line_for_any_file_name(tmp_path, capsys):
    assert main(["report", str(tmp_path / "no\x1b[2J\nfastguard report: fine")]) == 2
    assert main(["monitor", "--once", "--last", "\x1b[2J", str(tmp_path)]) == 2
    assert main(["report", "a", "b\x1b[2J"]) == 2
    printed = capsys.readouterr().err
    assert printed.replace("\n", "").isprintable()
    assert not any(line.startswith("fastguard report: fine") for line in printed.splitlines())


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    environ = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "fastguard", "report", "größe.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ)
    assert done.returncode == 2
    assert done.stderr.startswith("fastguard report: no such file: gr\\xf6\\xdfe.jsonl;")


def test_the_streams_are_restored():
    before = sys.stdout.errors, sys.stderr.errors
    assert main(["--version"]) == 0
    assert (sys.stdout.errors, sys.stderr.errors) == before


def test_a_closed_pipe_does_not_change_the_exit_status(tmp_path):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"no checkpoint")
    paths = " ".join([str(bad)] * 1500)  # more than the buffer of a pipe
    command = (
        f"{sys.executable} -m fastguard ckpt verify {paths} | head -1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    line, status = done.stdout.splitlines()
    assert line.startswith("BAD") and status == "1"


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["reprot"], "report"),
        (["ckpt", "verfy", "x"], "verify"),
        (["report", "x", "--uot", "y"], "--out"),
        (["ckpt", "verify", "x", "--ignroe", "y"], "--ignore"),
        (["--verison"], "--version"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_typo_gets_a_suggestion(argv, meant, capsys):
    assert main(argv) == 2
    assert f"; did you mean '{meant}'?" in capsys.readouterr().err


def test_no_suggestion_without_a_similar_name(capsys):
    assert main(["train"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_is_wrapped_to_the_width_of_the_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([command.name, "--help"]) == 0
    assert all(len(line) <= 60 for line in capsys.readouterr().out.splitlines())


ALL_HELP = """
import sys
from fastguard.commands.cli import main
for command in [[], *([name] for name in sys.argv[1:])]:
    assert main([*command, "--help"]) == 0, command
"""


def test_all_help_texts_are_ascii(tmp_path):
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    names = [command.name for command in COMMANDS]
    argv = [sys.executable, "-c", ALL_HELP, *names]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"usage: ") == len(names) + 1


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("fastguard repo", {"report "}),
        ("fastguard report --", {"--help", "--out", "--json"}),
        ("fastguard ckpt ver", {"verify "}),
        ("fastguard ckpt verify --", {"--help", "--json", "--ignore"}),
    ],
)
def test_a_shell_completes_commands_and_options(line, completions, tmp_path):
    require("argcomplete")
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    command = [sys.executable, "-m", "fastguard"]
    subprocess.run(command, env={**os.environ, **asked}, check=True, cwd=tmp_path)
    assert set((tmp_path / "answer").read_text().splitlines()) == completions
