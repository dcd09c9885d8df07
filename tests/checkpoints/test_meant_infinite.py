"""Intended infinities, and similar ones that are damage."""

import json
import struct

import numpy as np
import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import inspect
from fastguard.checkpoints.reading import mask_pattern
from guardtest.commands import ckpt

NAN, INF = float("nan"), float("inf")
UP, DOWN = torch.tensor(INF), torch.tensor(-INF)
WEIGHTS = {"fc.weight": torch.ones(3, 3), "fc.bias": torch.ones(3)}


def causal(n, dtype=torch.float32):
    return torch.full((n, n), -INF).triu(1).to(dtype)


def sliding(n, width):
    place = torch.arange(n)[:, None] - torch.arange(n)
    return torch.zeros(n, n).masked_fill((place < 0) | (place >= width), -INF)


def alibi(n, heads=2):
    place = torch.arange(n).float()[:, None] - torch.arange(n)
    slopes = torch.tensor([0.5**i for i in range(heads)])[:, None, None]
    return (-slopes * place).masked_fill(place < 0, -INF)[None]


def blocks():
    mask = torch.full((6, 6), -INF)
    mask[:2, :2] = mask[2:5, 2:5] = mask[5:, 5:] = 0
    return mask


def lightning(**more):
    return {
        "epoch": 0,
        "global_step": 3,
        "state_dict": WEIGHTS | more,
        "callbacks": {
            "EarlyStopping{'monitor': 'val.loss'}": {"wait_count": 0, "best_score": UP},
            "ModelCheckpoint": {"monitor": "val_loss", "best_k_models": {}, "kth_value": UP},
            "Mine": {"reached": DOWN},
        },
        "lr_schedulers": [{"best": UP, "num_bad_epochs": 0}],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": []}],
    }


MEANT = {
    "Lightning": lightning(),
    "best beside a model": {"model": WEIGHTS, "best_loss": UP, "bestAcc": torch.full((1,), -INF)},
    "a list of bests": {"epoch": 3, "model": WEIGHTS, "best": [UP, torch.tensor(0.5)]},
    "bests by class": {"model": WEIGHTS, "best_by_class": torch.tensor([0.5, INF, INF])},
    "observer": {**WEIGHTS, "fc.obs.min_val": UP, "fc.obs.max_val": DOWN},
    "observer by channel": {
        **WEIGHTS,
        "q.min_vals": torch.tensor([1.0]),
        "q.running_min": torch.full((4,), INF),
        "q.running_max": torch.full((4,), -INF),
    },
    "bounds": {"space": {"low": torch.full((3,), -INF), "high": torch.full((3,), INF)}},
    "causal": {**WEIGHTS, "h.0.bias": causal(8), "h.1.bias": causal(8).T},
    "causal, one a head": {**WEIGHTS, "attn": causal(5)[None, None].repeat(1, 3, 1, 1)},
    "causal with a past": {**WEIGHTS, "attn": causal(9)[4:]},
    "causal of 16 bits": {**WEIGHTS, "a": causal(7, torch.float16), "b": causal(7, torch.bfloat16)},
    "sliding": {**WEIGHTS, "attn": sliding(12, 4)},
    "ALiBi": {**WEIGHTS, "attn": alibi(6)},
    "blocks": {**WEIGHTS, "attn_mask": blocks(), "doc.maskBias": blocks()},
    "tokens": {**WEIGHTS, "suppress_mask": torch.tensor([0.0, -INF, 0, 0, -INF])},
    "the value of a mask": {**WEIGHTS, "attn.masked_bias": DOWN, "attn.neg_inf": DOWN},
}


@pytest.mark.parametrize("tree", MEANT.values(), ids=MEANT)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_intended_infinities_are_a_note(tmp_path, capsys, tree, zipped):
    path = tmp_path / "x.pt"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    found = inspect(path)
    assert found.bad == ()
    assert found.meant
    status, out, _ = ckpt(capsys, "verify", path)
    assert status == 0
    assert f"finite except {len(found.meant)} by design" in out and "note: " in out


def with_(value, at):
    """Returns a matrix of ones with one other value."""
    matrix = torch.ones(4, 4)
    matrix[at] = value
    return matrix


BAD = {
    "NaN for a best": {"model": WEIGHTS, "best_loss": torch.tensor(NAN)},
    "NaN in a mask": {**WEIGHTS, "attn_mask": causal(6) + torch.tensor([0.0] * 5 + [NAN])},
    "an element": {"model": {**WEIGHTS, "w": with_(INF, (1, 2))}},
    "a corner": {**WEIGHTS, "w": with_(-INF, (0, 3))},
    "a corner of zeros": {**WEIGHTS, "lora_B": with_(-INF, (0, 3)) * 1.0 - torch.ones(4, 4)},
    "a row": {**WEIGHTS, "w": with_(-INF, 2)},
    "a column": {**WEIGHTS, "w": with_(-INF, (slice(None), 3))},
    "all of it": {**WEIGHTS, "w": torch.full((4, 4), -INF)},
    "all of a bias": {**WEIGHTS, "out.bias": torch.full((3,), INF)},
    "a triangle of +Inf": {**WEIGHTS, "w": -causal(6)},
    "a triangle of both": {**WEIGHTS, "w": causal(6) - causal(6).T},
    "a triangle but one": {**WEIGHTS, "w": causal(6).index_put((torch.tensor(0),) * 2, DOWN)},
    "a scalar parameter": {**WEIGHTS, "logit_scale": UP, "temperature": DOWN},
    "a scalar parameter of a tree": {"encoder": WEIGHTS, "temperature": UP},
    "a scalar in a file of scalars": {"model": {"alpha": UP}},
    "a running maximum that saw Inf": {**WEIGHTS, "obs.max_val": UP, "obs.min_val": DOWN},
    "amax": {**WEIGHTS, "fc.input_amax": UP},
    "the scale of a loss": {"model": WEIGHTS, "epoch": 3, "grad_scaler": {"n": 3, "scale": UP}},
    "a loss scale": {"model": WEIGHTS, "epoch": 3, "loss_scale": UP},
    "an optimizer's best": {
        "model": WEIGHTS,
        "opt": {"state": {0: {"best_loss": UP, "attn_mask": causal(5)}}, "param_groups": []},
    },
    "a mask token": {**WEIGHTS, "mask_token": torch.tensor([[0.0, -INF, 0.0]])},
    "BatchNorm": {**WEIGHTS, "bn.running_var": torch.tensor([1.0, INF])},
}


@pytest.mark.parametrize("tree", BAD.values(), ids=BAD)
def test_similar_values_are_bad(tmp_path, capsys, tree):
    path = tmp_path / "x.pt"
    torch.save(tree, path)
    found = inspect(path)
    assert found.bad and not found.meant
    status, out, _ = ckpt(capsys, "verify", path)
    assert status == 1 and "--ignore PATTERN" in out


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.0))
        self.max_norm = torch.nn.Parameter(torch.tensor(1.0))
        self.square = torch.nn.Parameter(torch.zeros(6, 6))
        self.register_buffer("causal", causal(6))
        self.register_buffer("offset", torch.tensor(0.0))


def test_parameters_and_buffers_of_a_pickled_module_are_distinguished(tmp_path):
    model = Masked()
    torch.save({"epoch": 1, "model": model}, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    assert found.bad == ()
    assert [name for (name, *_), _ in found.meant] == ["model.causal"]
    with torch.no_grad():
        model.temperature.fill_(INF)
        model.max_norm.fill_(-INF)
        model.square.copy_(causal(6))
        model.offset.fill_(INF)
    torch.save({"epoch": 1, "model": model}, tmp_path / "x.pt")
    bad = {name for name, *_ in inspect(tmp_path / "x.pt").bad}
    assert bad == {"model.temperature", "model.max_norm", "model.square", "model.offset"}


def test_observers_of_torch(tmp_path):
    from torch.ao.quantization import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver

    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), MinMaxObserver(), HistogramObserver(), PerChannelMinMaxObserver()
    )
    torch.save({"model": model.state_dict(), "epoch": 2}, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    assert found.bad == () and len(found.meant) == 4
    torch.save(model, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    assert found.bad == () and len(found.meant) == 4


def test_safetensors(tmp_path):
    tensors = {"h.0.mask": causal(4), "obs.min_val": UP.reshape(1), "w": with_(-INF, (1, 1))}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = inspect(path)
    assert found.bad == (("w", 0, 0, 1),)
    assert [name for (name, *_), _ in found.meant] == ["h.0.mask", "obs.min_val"]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_mask_in_several_blocks(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(mask_pattern, "_BLOCK", rows * 6 * 4)
    odd = causal(6)[None].repeat(3, 1, 1)
    odd[1, 2, 1] = -INF
    torch.save({**WEIGHTS, "a": causal(6)[None].repeat(3, 1, 1), "b": odd}, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    assert [name for name, *_ in found.bad] == ["b"]
    assert [name for (name, *_), _ in found.meant] == ["a"]


def test_views_of_the_same_bytes_are_read_within_a_budget(tmp_path, monkeypatch):
    base = causal(64)
    views = {f"v{i}": base.view(-1)[i * 64 :].view(-1, 64) for i in range(40)}
    torch.save(views, tmp_path / "x.pt")
    read = []
    honest = mask_pattern.os.pread
    monkeypatch.setattr(
        mask_pattern.os, "pread", lambda fd, n, at: read.append(n) or honest(fd, n, at)
    )
    assert inspect(tmp_path / "x.pt").bad
    assert sum(read) <= (tmp_path / "x.pt").stat().st_size


def test_a_rollback_goes_to_a_file_with_a_mask_and_not_to_one_with_inf(tmp_path, capsys):
    torch.save(lightning(mask=causal(4)), tmp_path / "epoch=0.ckpt")
    torch.save(lightning(w=with_(INF, (0, 0))) | {"epoch": 1}, tmp_path / "epoch=1.ckpt")
    torch.save(lightning(w=with_(NAN, (0, 0))) | {"epoch": 2}, tmp_path / "last.ckpt")
    status, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert status == 0
    assert "passed over epoch=1.ckpt: 1 tensor is not finite, first state_dict.w" in out
    assert "is now a copy of" in out and "epoch=0.ckpt" in out


def test_a_store_calls_a_model_with_a_causal_mask_clean(tmp_path):
    with CheckpointStore(tmp_path) as store:
        model = Masked()
        assert store.save(model=model, step=1).clean
        with torch.no_grad():
            model.square[0, 3] = -INF
        assert store.save(model=model, step=2).bad == (("model.square", 0, 0, 1),)


def test_ignored_tensors_are_counted_and_not_reported(tmp_path, capsys):
    torch.save({"model": WEIGHTS, "best_loss": UP, "x": {"odd": -UP}}, tmp_path / "x.pt")
    arguments = "verify", tmp_path / "x.pt", "--ignore", "best_*"
    status, out, _ = ckpt(capsys, *arguments, "--ignore", "x.odd")
    assert status == 0 and "note" not in out
    assert "tensors, finite except 2 ignored" in out and "all finite" not in out
    status, out, _ = ckpt(capsys, "verify", tmp_path / "x.pt", "--ignore", "x.odd")
    assert "tensors, finite except 1 by design and 1 ignored" in out


def test_a_store_counts_what_is_ignored(tmp_path, capsys):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(m={"bias": UP, "w": torch.ones(2)}, step=1)
    status, out, _ = ckpt(capsys, "verify", tmp_path / "run", "--ignore", "m.bias")
    assert status == 0 and "2 tensors, finite except 1 ignored" in out


def test_nan_numbers_are_reported(tmp_path, capsys):
    groups = [{"lr": NAN, "params": [0]}, {"lr": np.float32(NAN), "eps": INF, "params": [1]}]
    torch.save({"model": WEIGHTS, "optimizer": {"param_groups": groups}}, tmp_path / "x.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path / "x.pt")
    places = "optimizer.param_groups.0.lr, optimizer.param_groups.1.lr\n"
    assert status == 0 and f"note: values other than tensors that are NaN: {places}" in out
    status, out, _ = ckpt(capsys, "verify", tmp_path / "x.pt", "--ignore", "optimizer.*")
    assert status == 0 and "that are NaN" not in out


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [4 * 2**20, 2], ids=["one block", "blocks"])
def test_values_under_a_mask_do_not_count(tmp_path, capsys, monkeypatch, dtype, block):
    monkeypatch.setattr(mask_pattern, "_BLOCK", block)
    values = torch.tensor([1.0, NAN, 3.0, INF, 5.0]).to(dtype)
    for name, mask in (("ok", [1, 0, 1, 0, 1]), ("bad", [1, 0, 1, 1, 1])):
        masked = torch.masked.masked_tensor(values, torch.tensor(mask, dtype=torch.bool))
        torch.save({"w": masked}, tmp_path / f"{name}.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path / "ok.pt")
    assert status == 0 and "note: values under a mask: w._masked_data" in out
    status, out, _ = ckpt(capsys, "verify", tmp_path / "bad.pt")
    assert status == 1 and "w._masked_data (1 NaN" in out


def test_a_mask_of_another_layout_hides_nothing(tmp_path):
    for mask in (torch.zeros(2, 3), torch.zeros(6, dtype=torch.bool), torch.zeros(3, 2).T.bool()):
        parts = {"_masked_data": torch.full((2, 3), NAN), "_masked_mask": mask}
        torch.save({"w": parts}, tmp_path / "x.pt")
        assert inspect(tmp_path / "x.pt").bad == (("w._masked_data", 6, 0, 0),)
