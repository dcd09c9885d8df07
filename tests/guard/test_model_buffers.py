"""With `protect_buffers`, a batch whose step is skipped does not change any buffer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastguard.guard.model_buffers as model_buffers
from fastguard import (
    GuardedOptimizer,
    SpikeRule,
    protect_buffers,
)
from fastguard.stages.contract import HostVerdict, Verdict
from fastguard.stages.reason import Reason
from guardtest.buffer_loop import Loop, buffers_of, same


@pytest.fixture(params=["host", "device"])
def verdict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with a verdict on the host, and with one on the device as on a GPU."""
    on_host = model_buffers._restores_buffers
    if request.param == "device":

        def on_device(verdict: Verdict) -> Tensor:
            known = on_host(verdict)
            plain = {n: getattr(verdict, n) for n in Verdict.__dataclass_fields__}
            found = on_host(Verdict(**plain))
            assert isinstance(found, Tensor) and bool(found) == known
            return found

        monkeypatch.setattr(model_buffers, "_restores_buffers", on_device)
    return request.param


class MinMax(nn.Module):
    """An observer as used in quantization; its buffers are infinite before the first batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("min_val", torch.tensor(math.inf, dtype=dtype))
        self.register_buffer("max_val", torch.tensor(-math.inf, dtype=dtype))
        self.register_buffer("seen", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach()
        self.min_val.copy_(torch.minimum(self.min_val, now.amin()))
        self.max_val.copy_(torch.maximum(self.max_val, now.amax()))
        self.seen += 1
        return x


class PerChannel(nn.Module):
    """An observer whose buffers get their shape from the first batch, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.tensor([]))

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().abs().amax(0)
        if self.amax.numel() == 0:
            self.amax.resize_(now.shape).zero_()
        self.amax.copy_(torch.maximum(self.amax, now))
        return x


class History(nn.Module):
    """An amax history that each forward pass replaces with a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.amax = torch.cat([x.detach().abs().max().view(1), self.amax[:-1]])
        return x


class Growing(nn.Module):
    """A buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.norms = torch.cat([self.norms, x.detach().norm().view(1)])
        return x


class Expanded(nn.Module):
    """A running mean, kept as a view that repeats one number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean[:1].lerp(x.detach().mean().view(1), 0.5).expand(4)
        return x


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "instancenorm": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1)),
        nn.ConstantPad1d(1, 0.5),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(12, 4),
    ),
    "spectral-norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "spectral-norm-parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "min-max": MinMax,
    "min-max-16": lambda: MinMax(torch.bfloat16),
    "per-channel": PerChannel,
    "history": History,
    "growing": Growing,
    "expanded": Expanded,
    "lazy": nn.LazyBatchNorm1d,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.usefixtures("verdict")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm`")
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_run_with_bad_batches_ends_bitwise_as_one_without(kind: str, fused: bool) -> None:
    torch.manual_seed(1)
    clean = Loop(KINDS[kind](), fused)
    torch.manual_seed(1)
    run = Loop(KINDS[kind](), fused)
    for loop in (clean, run):
        protect_buffers(loop.model, loop.opt)
    for i in range(6):
        clean.batch(i)
        run.batch(i)
        if i in (0, 2, 3):
            run.batch(100 + i, bad=True)
    assert run.opt.skipped_steps == 3
    assert same(buffers_of(run.model), buffers_of(clean.model))
    assert torch.equal(run.evaluation(), clean.evaluation())
    assert run.evaluation().isfinite().all()


@pytest.mark.usefixtures("verdict")
@pytest.mark.parametrize(
    "kind", ["batchnorm", "min-max", "per-channel", "history", "growing", "expanded"]
)
def test_the_first_batch_may_be_bad(kind: str) -> None:
    loop = Loop(KINDS[kind]())
    protect_buffers(loop.model, loop.opt)
    before = buffers_of(loop.model)
    loop.batch(0, bad=True)
    assert same(buffers_of(loop.model), before)


def test_an_expanded_buffer_that_becomes_nan_in_an_applied_step_is_restored() -> None:
    loop = Loop(Expanded())
    protect_buffers(loop.model, loop.opt)
    (module,) = (m for m in loop.model.modules() if isinstance(m, Expanded))
    loop.batch(0)
    before = module.mean.clone()
    module.mean = torch.full((1,), math.nan).expand(4)
    loop.opt.step()
    assert loop.opt.applied_steps == 2
    assert torch.equal(module.mean, before)


def test_without_protection_the_evaluation_is_nan() -> None:
    """docs/limits.md says so about plain loops; change both if torch changes."""
    loop = Loop(nn.BatchNorm1d(4))
    loop.batch(0, bad=True)
    loop.batch(1)
    assert all(p.isfinite().all() for p in loop.model.parameters())
    assert loop.evaluation().isnan().all()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_buffers_are_reset_by_their_module_after_a_bad_first_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False))
    opt = GuardedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1))
    protect_buffers(model, opt)
    model(torch.full((8, 4), math.nan)).sum().backward()
    opt.step()
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert torch.equal(model[1].running_var, torch.ones(4))
    assert model[1].num_batches_tracked == 0


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", nn.parameter.UninitializedBuffer())

    def forward(self, x: Tensor) -> Tensor:
        if nn.parameter.is_lazy(self.amax):
            self.amax.materialize((4,))
            self.amax.copy_(x.detach().abs().amax(0))
        return x


def test_a_buffer_without_earlier_values_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Late())
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    protect_buffers(model, opt)
    model(torch.full((8, 4), math.nan)).sum().backward()
    opt.step()
    assert "left NaN or Inf in 1.amax" in caplog.text


@pytest.mark.usefixtures("verdict")
def test_the_statistics_of_a_skipped_spike_are_restored() -> None:
    rule = {"loss": SpikeRule(window=4, warmup=2)}
    loop = Loop(nn.BatchNorm1d(4), spike=rule)
    protect_buffers(loop.model, loop.opt)
    for i in range(4):
        loop.batch(i)
    before = buffers_of(loop.model)
    loop.model(torch.randn(8, 4)).sum().backward()
    loop.opt.step(loss=1e9)
    assert loop.opt.skipped_steps == 1
    assert same(buffers_of(loop.model), before)


def test_loss_scale_skips_keep_the_statistics_of_the_batch() -> None:
    loop = Loop(nn.BatchNorm1d(4))
    protect_buffers(loop.model, loop.opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    loss = loop.model(torch.randn(8, 4) * 100).square().mean()
    scaler.scale(loss).backward()
    after_forward = buffers_of(loop.model)
    scaler.step(loop.opt)
    scaler.update()
    assert loop.opt.records()[0].reason == "loss_scale"
    assert same(buffers_of(loop.model), after_forward)
    verdict = loop.opt.last
    assert isinstance(verdict, HostVerdict) and verdict.known.reason == Reason.LOSS_SCALE
    plain = Verdict(**{n: getattr(verdict, n) for n in Verdict.__dataclass_fields__})
    assert not model_buffers._restores_buffers(plain)


def test_elements_that_overflow_in_an_applied_step_are_restored(
    verdict: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(nn.BatchNorm1d(4))
    buffers = protect_buffers(loop.model, loop.opt)
    loop.batch(0)
    norm = loop.model[1]
    kept = norm.running_var.clone()
    with torch.no_grad():
        norm.running_var[2] = math.inf
        norm.running_var[0] = 7.0
    for p in loop.model.parameters():
        p.grad = torch.ones_like(p)
    loop.opt.step()
    assert norm.running_var.tolist() == [7.0, *kept[1:].tolist()]
    assert buffers.mended == 1
    assert ("were restored: 1.running_var" in caplog.text) == (verdict == "host")


@pytest.mark.usefixtures("verdict")
def test_constant_infinite_buffers_remain() -> None:
    loop = Loop(nn.BatchNorm1d(4))
    mask = torch.full((5, 5), -math.inf).triu(1)
    loop.model.register_buffer("mask", mask)
    loop.model.register_buffer("expanded", torch.ones(1).expand(3))
    loop.model.register_buffer("none", None)
    loop.model.register_buffer("empty", torch.empty(0))
    loop.model.register_buffer("sparse", torch.eye(3).to_sparse())
    loop.model.register_buffer("flags", torch.tensor([True, False]))
    protect_buffers(loop.model, loop.opt)
    for i in range(4):
        loop.batch(i, bad=i % 2 == 1)
    assert torch.equal(loop.model.mask, torch.full((5, 5), -math.inf).triu(1))
    assert torch.equal(loop.model.sparse.to_dense(), torch.eye(3))
    assert loop.model.flags.tolist() == [True, False]


@pytest.mark.usefixtures("verdict")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.uint16]
)
def test_buffers_of_any_dtype_are_restored(dtype: torch.dtype) -> None:
    loop = Loop(nn.Identity())
    loop.model.register_buffer("state", torch.ones(6).to(dtype))
    protect_buffers(loop.model, loop.opt)
    bits = loop.model.state.view(torch.uint8).clone()
    loop.model.state.copy_(torch.full((6,), 2.0).to(dtype))
    loop.batch(0, bad=True)
    assert torch.equal(loop.model.state.view(torch.uint8), bits)
    loop.model.state.copy_(torch.full((6,), 2.0).to(dtype))
    if dtype.is_floating_point:
        loop.model.state[:3] = torch.full((3,), math.nan).to(dtype)
    loop.batch(1)
    expected = [1.0] * 3 + [2.0] * 3 if dtype.is_floating_point else [2.0] * 6
    assert loop.model.state.to(torch.complex64).tolist() == expected


def test_invalid_arguments_are_named() -> None:
    loop = Loop(nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match=r"AdamW; pass the fastguard\.GuardedOptimizer"):
        protect_buffers(loop.model, loop.opt.optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is a list"):
        protect_buffers([loop.model], loop.opt)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`also` contains a str"):
        protect_buffers(loop.model, loop.opt, also=["amax"])  # type: ignore[list-item]


@pytest.mark.usefixtures("verdict")
def test_tensors_outside_of_buffers_can_be_passed() -> None:
    loop = Loop(nn.Identity())
    history = torch.zeros(3, 2)
    protect_buffers(loop.model, loop.opt, also=[history.t()])
    history[1] = math.nan
    loop.batch(0, bad=True)
    assert not history.any()
