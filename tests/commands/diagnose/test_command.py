"""`fastguard diagnose module:factory`: output, exit status and usage errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from fastguard import CheckpointStore
from fastguard.commands.cli import main
from guardtest import require

SETUP = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

def sound():
    print("building")
    net = model()
    inputs = torch.randn(8, 4)
    return {
        "model": net,
        "batch": (inputs, inputs[:, :1]),
        "loss_fn": nn.MSELoss(),
        "optimizer": torch.optim.AdamW([
            {"params": [p for p in net.parameters() if p.ndim > 1]},
            {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]),
        "data": [(inputs, inputs[:, :1])],
    }

def broken():
    setup = sound()
    setup["optimizer"].param_groups[0]["lr"] = 8.88e-21
    return setup

def imperfect():
    return sound() | {"loss_fn": nn.MSELoss(reduction="sum")}

def stepwise():
    setup = sound()
    del setup["loss_fn"]
    loss = nn.MSELoss()
    return setup | {"step": lambda model, batch: loss(model(batch[0]), batch[1])}

class Down(nn.Module):
    def forward(self, x):
        return x * 1e-5

def too_large_for_float16():
    setup = sound()
    nn.init.constant_(setup["model"][0].bias, 1e5)
    setup["model"].insert(1, Down())
    return setup
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which contains train.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "train", raising=False)
    (tmp_path / "train.py").write_text(SETUP)
    yield tmp_path
    sys.modules.pop("train", None)


def write(folder: Path, text: str) -> None:
    (folder / "train.py").write_text(SETUP + textwrap.dedent(text))


@pytest.mark.parametrize(
    "factory, more, status",
    [
        ("sound", [], 0),
        ("stepwise", [], 0),
        ("broken", [], 1),
        ("broken", ["--fail-on", "never"], 0),
        ("imperfect", [], 0),
        ("imperfect", ["--fail-on", "warning"], 1),
        ("sound", ["--fail-on", "warning"], 0),
        ("too_large_for_float16", [], 0),
        ("too_large_for_float16", ["--autocast", "float16"], 1),
        ("too_large_for_float16", ["--autocast", "bfloat16"], 0),
    ],
)
def test_the_exit_status_depends_on_the_severity(factory, more, status, folder, capsys) -> None:
    assert main(["diagnose", f"train:{factory}", *more]) == status
    printed = capsys.readouterr().out
    assert ("float16-range" in printed) == (more == ["--autocast", "float16"])


def test_findings_are_printed_with_a_remedy_and_the_verdict_last(folder, capsys) -> None:
    assert main(["diagnose", "train:broken"]) == 1
    printed = capsys.readouterr().out
    assert "ERROR   optimizer: lr-vanished in param group 0" in printed
    assert "Remedy: restart the schedule" in printed
    assert "1 error" in printed.splitlines()[-1]


def test_with_json_only_json_is_printed(folder, capsys) -> None:
    assert main(["diagnose", "train:broken", "--json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == "building\n"
    assert result["worst"] == "error"
    first = result["findings"][0]
    assert (first["kind"], first["severity"], first["check"]) == (
        "lr-vanished",
        "error",
        "optimizer",
    )
    assert first["value"] == 8.88e-21 and first["limit"] > 0 and first["remedy"]


def test_a_table_is_printed_on_a_terminal(folder) -> None:
    require("rich")
    import pty

    inside, outside = pty.openpty()
    command = [sys.executable, "-m", "fastguard", "diagnose", "train:broken"]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    with subprocess.Popen(command, cwd=folder, stdout=outside, env=environment) as process:
        os.close(outside)
        printed = b""
        while True:
            try:
                piece = os.read(inside, 65536)
            except OSError:  # the other end was closed
                break
            printed += piece
            if not piece:
                break
        assert process.wait() == 1
    os.close(inside)
    text = printed.decode()
    assert "value" in text and "lr-vanished" in text and "limit 1e-12" in text
    assert "\x1b[1;31m" in text  # errors are red


# Usage errors: one line, status 2, no traceback.


@pytest.mark.parametrize(
    "spec, says",
    [
        ("train", "'train' is not of the form module:factory"),
        ("train:", "is not of the form module:factory"),
        ("trane:sound", "there is no module 'trane'"),
        ("train.py:sound", "there is no module 'train.py'"),
        ("./train.py:sound", "'./train.py' is a file, not a module; run the command in the folder"),
        ("./train.py:sound", "run the command in the folder of this file, with train:sound"),
        ("sub/train.py:sound", "run the command in the folder of this file, with train:sound"),
        ("sub/train:sound", "run the command in the folder of this file, with train:sound"),
        ("..train:sound", "'..train' is a file, not a module"),
        ("train:sund", "train has no 'sund'; it has model, sound, broken"),
        ("train:LR", "train:LR is a float, not a function"),
        ("train:raises", "train:raises() raises FileNotFoundError: no data"),
        ("train:exits", "train:exits() raises SystemExit: 3"),
        ("train:nothing", "train:nothing() returns a NoneType; return a dict with model, batch"),
        ("train:lacks", "lacks batch; its keys are model, batch, loss_fn"),
        ("train:unknown", "has an unknown loss; its keys are"),
        ("train:function", "the model of train:function() is a function, not a torch.nn.Module"),
        ("train:both", "both loss_fn and step are given"),
        ("train:single", "batch is a Tensor; pass (inputs, targets)"),
        ("train:scheduler", "optimizer is a StepLR, not a torch.optim.Optimizer"),
        ("train:number", "data is a int; pass an iterable of batches"),
    ],
)
def test_a_usage_error_is_one_line(spec, says, folder, capsys) -> None:
    write(
        folder,
        """
        LR = 0.1
        def raises(): raise FileNotFoundError("no data")
        def exits(): raise SystemExit(3)
        def nothing(): pass
        def lacks(): return {"model": model(), "loss_fn": nn.MSELoss()}
        def unknown(): return sound() | {"loss": nn.MSELoss()}
        def function(): return sound() | {"model": model}
        def both(): return sound() | {"step": lambda model, batch: 0}
        def single(): return sound() | {"batch": torch.zeros(1)}
        def scheduler():
            setup = sound()
            schedule = torch.optim.lr_scheduler.StepLR(setup["optimizer"], 1)
            return setup | {"optimizer": schedule}
        def number(): return sound() | {"data": 3}
        """,
    )
    assert main(["diagnose", spec]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("fastguard diagnose: ") and error.count("\n") == 1


def test_the_line_of_user_code_that_raised_is_named(folder, capsys) -> None:
    write(folder, "def raises():\n    return {}['here']\n")
    line = (folder / "train.py").read_text().splitlines().index("    return {}['here']") + 1
    assert main(["diagnose", "train:raises"]) == 2
    assert f"KeyError: 'here' ({folder}/train.py:{line})" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code, says",
    [
        ("1/0", "importing train raises ZeroDivisionError: division by zero"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
        ("raise SystemExit(0)", 'under if __name__ == "__main__":'),
        ("def", "importing train raises SyntaxError"),
        ("x = 1\ndef", "train.py:2)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_a_usage_error(code, says, folder, capsys) -> None:
    (folder / "train.py").write_text(code)
    assert main(["diagnose", "train:make"]) == 2
    assert says in capsys.readouterr().err


# Checkpoints.


class Sound(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def poisoned() -> nn.Module:
    model = Sound()
    nn.init.constant_(model[2].bias, float("nan"))
    return model


@pytest.mark.parametrize(
    "save",
    [
        lambda m, path: torch.save(m.state_dict(), path),
        lambda m, path: torch.save({"epoch": 3, "model": m.state_dict()}, path),
        lambda m, path: torch.save({"state_dict": _prefixed(m, "module.")}, path),
        lambda m, path: torch.save({"ema": None, "model": m.bfloat16()}, path),  # pickled
        lambda m, path: torch.save(m.state_dict(), path, _use_new_zipfile_serialization=False),
    ],
    ids=["state_dict", "nested", "ddp", "pickled", "legacy"],
)
def test_the_weights_of_a_checkpoint_are_diagnosed(save, folder, capsys) -> None:
    save(poisoned(), folder / "last.pt")
    assert main(["diagnose", "train:sound", "--checkpoint", "last.pt"]) == 1
    assert "2.bias (1 NaN)" in capsys.readouterr().out


def test_safetensors_and_stores_are_accepted(folder, capsys) -> None:
    model = poisoned()
    with CheckpointStore(folder / "store") as store:
        store.save(step=1, model=model)
    file = next((folder / "store").glob("*.pt"))
    assert main(["diagnose", "train:sound", "--checkpoint", str(file)]) == 1
    assert "2.bias (1 NaN)" in capsys.readouterr().out
    write_safetensors(folder / "model.safetensors", model)
    assert main(["diagnose", "train:sound", "--checkpoint", "model.safetensors"]) == 1
    assert "2.bias (1 NaN)" in capsys.readouterr().out


def write_safetensors(path: Path, model: nn.Module) -> None:
    """Writes the length of the header, the JSON header, and the bytes of the tensors."""
    header, data = {}, b""
    for name, tensor in model.state_dict().items():
        raw = tensor.numpy().tobytes()
        places = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _prefixed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def test_tied_weights_may_be_saved_once(folder, capsys) -> None:
    write(
        folder,
        """
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
                self.b.weight = self.a.weight
            def forward(self, x):
                return self.b(self.a(x).relu())
        def tied():
            x = torch.randn(8, 4)
            return {"model": Tied(), "batch": (x, x), "loss_fn": nn.MSELoss()}
        def save():
            torch.save(Tied().state_dict(), "tied.pt")
            return tied()
        """,
    )
    assert main(["diagnose", "train:save"]) == 0
    assert main(["diagnose", "train:tied", "--checkpoint", "tied.pt"]) == 0


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder; pass a file in it"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "truncated or damaged"),
        (
            lambda path: torch.save(nn.Linear(4, 16).state_dict(), path),
            "lacks 4 of the model's 4 tensors: 0.weight",
        ),
        (
            lambda path: torch.save(dict(list(Sound().state_dict().items())[:3]), path),
            "lacks 1 of the model's 4 tensors: 2.bias",
        ),
        (
            lambda path: torch.save({**Sound().state_dict(), "0.bias": torch.zeros(3)}, path),
            "has 0.bias with shape [3], the model has [16]",
        ),
    ],
    ids=["missing", "folder", "damaged", "other", "partial", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_a_usage_error(make, says, folder, capsys) -> None:
    make(folder / "last.pt")
    assert main(["diagnose", "train:sound", "--checkpoint", "last.pt"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
