"""A file without weights never replaces one with weights, whatever its contents and name."""

import os
import struct

import numpy as np
import pytest
import torch

import fastguard
from fastguard.checkpoints import CheckpointError, roll_back_file
from fastguard.checkpoints.reading.contents import read_contents
from fastguard.checkpoints.weights import holds_weights
from guardtest.commands import ckpt

NAN = float("nan")


def trained(kind=torch.optim.AdamW, **settings):
    model = torch.nn.Linear(4, 4)
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def guarded(**settings):
    model, optimizer = trained()
    made = fastguard.GuardedOptimizer(optimizer, **settings)
    model(torch.ones(1, 4)).sum().backward()
    made.step()
    return made


STATE = trained()[1].state_dict()
WITHOUT_WEIGHTS = {
    "adamw": STATE,
    "sgd": trained(torch.optim.SGD, momentum=0.9)[1].state_dict(),
    "guarded": guarded(max_norm=1.0).state_dict(),
    "guarded with a baseline": guarded(spike=fastguard.SpikeRule()).state_dict(),
    "under its name": {"optimizer": STATE, "epoch": 9},
    "guarded, under its name": {"optimizer": guarded().state_dict(), "scheduler": {"lr": [0.1]}},
    "two of them": [STATE, guarded().state_dict()],
    "by Lightning's names": {"optimizer_states": [STATE], "lr_schedulers": [], "loops": {}},
    "any name": {"opt_d": STATE, "opt_g": STATE},
    "the moments alone": STATE["state"],
    "DeepSpeed's": {"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(9)]}, "ds_config": {}},
    "random streams": {"cpu": torch.get_rng_state(), "torch_rng": torch.rand(9)},
    "a history": {"train_losses": torch.rand(100), "val_loss": np.ones(9), "epoch": 7},
    "other histories": {"train_loss_hist": np.ones(30), "acc_per_epoch": [torch.rand(9)] * 2},
    "an optimizer without settings": {"state": {0: {"q": torch.eye(4)}}, "param_groups": [{}]},
    "two of these": {"a": {"state": {0: {"q": torch.eye(4)}}, "param_groups": [{"params": [0]}]}},
    "data": {"x": torch.rand(10, 3), "y": torch.rand(10)},
    "a tensor": torch.rand(10, 3),
    "a list of tensors": [torch.rand(3)] * 2,
    "a scaler": torch.amp.GradScaler("cpu").state_dict(),
    "a scaler with tensors": {"scale": torch.tensor(65536.0), "growth_factor": 2.0, "_tracker": 0},
    "a scaler under its name": {"amp": {"scale": torch.tensor([65536.0]), "growth_interval": 2000}},
    "a guard's own state": {"fastguard": {"window": torch.rand(128)}},
    "numbered moments": {"exp_avg_0": torch.rand(3), "exp_avg_sq_0": torch.rand(3)},
    "means": {"mean_value": torch.tensor(0.5), "array": np.array(0.5), "weight": torch.tensor(9.0)},
    "two curves": {"train": torch.rand(100), "val": torch.rand(100)},
    "integers": {"tokens": torch.arange(9)},
}
WITH_WEIGHTS = {
    "a model": trained()[0].state_dict(),
    "a whole module": trained()[0],
    "model and optimizer": {"model": trained()[0].state_dict(), "optimizer": STATE},
    "model and guard": {"net": trained()[0].state_dict(), "o": guarded().state_dict(), "epoch": 3},
    "beside param_groups": {**STATE, "params": [torch.rand(3)]},
    "a head": {"score.weight": torch.rand(3)},
    "one tensor": {"w": torch.rand(3)},
    "layers called features": {"features.0.weight": torch.rand(3, 3)},
    "an embedding": {"embeddings": {"word": {"weight": torch.rand(3)}}},
    "the smallest layer": torch.nn.Linear(1, 1).state_dict(),
    "half": {"ema": trained()[0].half()},
    "arrays": {"params": {"w": np.ones(3, np.float32)}},
    "a loss with weights": {"loss_fn.weight": torch.rand(3), "body.weight": torch.rand(3)},
}


@pytest.mark.parametrize("case", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "nan"])
def test_files_without_weights_are_skipped(tmp_path, capsys, case, damaged):
    torch.save({"model": {"w": torch.full((99,), NAN)}}, tmp_path / "last.pt")
    if damaged:
        os.truncate(tmp_path / "last.pt", 200)
    torch.save(WITHOUT_WEIGHTS[case], tmp_path / "newer.pt")
    assert not holds_weights(read_contents(tmp_path / "newer.pt"))
    torch.save({"model": {"w": torch.ones(99)}}, tmp_path / "good.pt")
    os.utime(tmp_path / "good.pt", (1, 1))
    status, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert status == 0, out
    assert "passed over newer.pt: holds no " in out
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "good.pt").read_bytes()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"newer\.pt cannot be used for a rollback: holds no "
    ):
        roll_back_file(tmp_path / "last.pt", tmp_path / "newer.pt")
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("case", WITH_WEIGHTS)
def test_files_with_weights_are_chosen(tmp_path, capsys, case):
    (tmp_path / "last.pt").write_bytes(b"damaged")
    torch.save(WITH_WEIGHTS[case], tmp_path / "good.pt")
    assert ckpt(capsys, "rollback", tmp_path)[0] == 0
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "good.pt").read_bytes()


@pytest.mark.parametrize("damaged", [True, False])
def test_an_optimizer_may_replace_an_optimizer(tmp_path, damaged):
    for name in ("optimizer.pt", "optimizer-100.pt"):
        torch.save(STATE, tmp_path / name)
    if damaged:
        os.truncate(tmp_path / "optimizer.pt", 100)
    roll_back_file(tmp_path / "optimizer.pt", tmp_path / "optimizer-100.pt")
    assert torch.load(tmp_path / "optimizer.pt", weights_only=True)["param_groups"]


# Odd values in good files.

ODD = {
    "infinite epoch": {"epoch": float("inf")},
    "epoch of NaN": {"epoch": NAN},
    "negative infinite step": {"step": float("-inf")},
    "huge epoch": {"epoch": 10**5000},
    "huge metric": {"metric": 10**400},
    "huge step": {"global_step": 2**80},
    "text": {"epoch": "third", "metric": "good"},
    "list": {"epoch": [3], "metric": {"map": 1.0}},
    "flag": {"epoch": True},
    "tensor": {"epoch": torch.tensor(3), "metric": torch.tensor([1.0])},
    "header of text": {"fastguard": "0.1.0"},
    "header of numbers": {"fastguard": 3, "objects": {}},
    "header of nothing": {"fastguard": None, "objects": None, "data": []},
    "keys of numbers": {3: {"epoch": 5}, None: 1, (1, 2): 3},
}


@pytest.mark.parametrize("case", ODD)
def test_an_invalid_value_is_ignored_and_the_rest_of_the_folder_is_listed(tmp_path, capsys, case):
    torch.save({"model": {"w": torch.ones(3)}, "epoch": 3}, tmp_path / "epoch3.pt")
    torch.save({"model": {"w": torch.ones(3)}, **ODD[case]}, tmp_path / "other.pt")
    os.utime(tmp_path / "other.pt", (1, 1))
    status, out, _ = ckpt(capsys, "list", tmp_path)
    rows = {os.path.basename(row.split()[0]): row.split() for row in out.splitlines()[1:]}
    assert status == 0
    assert rows["epoch3.pt"][1] == "3" and rows["other.pt"][1:4] == ["-", "-", "-"]
    assert ckpt(capsys, "verify", tmp_path)[0] == 0
    (tmp_path / "last.pt").write_bytes(b"damaged")
    status, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert status == 0 and "epoch3.pt (epoch 3)" in out


def test_an_infinite_metric_counts(tmp_path, capsys):
    torch.save({"model": {"w": torch.ones(3)}, "metric": float("inf")}, tmp_path / "x.pt")
    _, out, _ = ckpt(capsys, "list", tmp_path)
    assert out.splitlines()[1].split()[3] == "inf"


def test_a_time_beyond_every_calendar_is_unknown(tmp_path, capsys):
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    for seconds in (2**40, -(2**40)):
        try:
            os.utime(tmp_path / "x.pt", (seconds, seconds))
        except OSError:  # this file system does not support such times
            continue
        assert ckpt(capsys, "list", tmp_path)[0] == 0


def test_safetensors_without_metadata_are_listed(tmp_path, capsys):
    for i, text in enumerate((b"null", b"{}", b'{"epoch":"4"}', b'{"epoch":"1e999","step":""}')):
        entry = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
        header = b'{"__metadata__":' + text + b"," + entry + b"}"
        raw = struct.pack("<Q", len(header)) + header + bytes(8)
        (tmp_path / f"{i}.safetensors").write_bytes(raw)
    status, out, _ = ckpt(capsys, "list", tmp_path)
    assert status == 0
    assert [row.split()[1] for row in out.splitlines()[1:]] == ["-", "-", "4", "-"]
