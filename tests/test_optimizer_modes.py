"""What a guarded step does: modes, scopes, limits, losses, spikes, budgets."""

import logging
import math

import pytest
import torch

from fastguard import (
    GuardedOptimizer,
    NonFiniteGradError,
    SpikeRule,
    Threshold,
    TrainingDivergedError,
)
from guardtest.tolerances import NORM_RTOL, scale_rtol
from guardtest.training import (
    assert_same_bits,
    give_gradients,
    new_parameters,
    poison,
    same_bits,
    snapshot,
)

NAN, INF = math.nan, math.inf


def sgd(parameters, **options):
    """With lr 1 the step is the gradient."""
    return GuardedOptimizer(torch.optim.SGD(parameters, lr=1.0), **options)


def grads_of(parameters):
    return [p.grad.clone() for p in parameters]


def one(*values, **options):
    """A guard over one parameter of zeros, with these gradients."""
    p = torch.nn.Parameter(torch.zeros(len(values)))
    p.grad = torch.tensor(values)
    return p, sgd([p], **options)


# Modes.


def test_zero_mode_clips_by_the_norm_of_what_remains():
    p, opt = one(3.0, NAN, 4.0, INF, -INF, nonfinite="zero", max_norm=1.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, 0.0, -0.8, 0.0, 0.0]))
    record = opt.records()[0]
    assert (record.action, record.reason) == ("sanitized", "nonfinite_grad")
    assert (record.nan, record.posinf, record.neginf) == (1, 1, 1)
    assert record.total_norm == 5.0


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_zero_mode_equals_torch_on_the_cleaned_gradients(max_norm):
    a, b = new_parameters(), new_parameters()
    opt = sgd(a, nonfinite="zero", max_norm=max_norm)
    alone = torch.optim.SGD(b, lr=1.0)
    for step in range(3):
        give_gradients(a, step)
        poison(a, NAN, at=step)
        poison(a, INF, at=0)
        give_gradients(b, step)
        poison(b, 0.0, at=step)
        poison(b, 0.0, at=0)
        opt.step()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(b, max_norm)
        alone.step()
    for x, y in zip(a, b, strict=True):
        rtol = 0.0 if max_norm is None else 4 * scale_rtol(torch.float32)
        torch.testing.assert_close(x, y, rtol=rtol, atol=0.0)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_raise_mode_names_the_culprit_and_changes_nothing(fused, flat):
    parameters = new_parameters()
    inner = torch.optim.AdamW(parameters, fused=fused)
    names = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
    opt = GuardedOptimizer(
        inner,
        nonfinite="raise",
        max_norm=0.1,
        spike=SpikeRule(warmup=2, window=4),
        named_parameters=names,
        flat_buckets=flat,
    )
    for step in range(3):
        give_gradients(parameters, step)
        opt.step()
    give_gradients(parameters, 3)
    poison(parameters, NAN, at=1)
    poison(parameters, -INF, at=2)
    before, saved, grads = snapshot(opt), opt.state_dict()["fastguard"], grads_of(parameters)
    with pytest.raises(NonFiniteGradError) as error:
        opt.step(loss=1.0)
    assert error.value.culprits == [("layer.1", 1, 0, 0), ("layer.2", 0, 0, 1)]
    assert "layer.1 (1 NaN), layer.2 (1 -Inf)" in str(error.value)
    assert_same_bits(snapshot(opt), before)
    assert all(map(same_bits, grads_of(parameters), grads))
    for key, value in opt.state_dict()["fastguard"].items():
        assert same_bits(value, saved[key]), key
    give_gradients(parameters, 3)
    opt.step()
    assert opt.applied_steps == 4


def test_raise_mode_leaves_gradients_unclamped():
    p, opt = one(5.0, NAN, nonfinite="raise")
    opt.param_groups[0]["clip_value"] = 1.0
    with pytest.raises(NonFiniteGradError):
        opt.step()
    assert p.grad[0] == 5.0
    p.grad = torch.tensor([5.0, -0.5])
    with pytest.raises(NonFiniteGradError, match="loss=nan"):
        opt.step(loss=NAN)
    assert p.grad[0] == 5.0
    opt.step()
    assert p.tolist() == [-1.0, 0.5]


def test_raise_mode_raises_for_a_loss_by_name():
    p, opt = one(1.0, nonfinite="raise")
    with pytest.raises(NonFiniteGradError, match="aux=inf") as error:
        opt.step(loss={"main": torch.tensor(1.0), "aux": torch.tensor(INF)})
    assert "main" not in str(error.value)
    assert error.value.culprits == []
    assert p.item() == 0.0


@pytest.mark.parametrize("value", [None, NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("max_norm", [1e-2, 1e9], ids=["clips", "does-not"])
def test_propagate_is_torch(value, max_norm):
    """Bit for bit, unless a coefficient below 1 depends on the last digit of torch's norm."""
    a, b = new_parameters(), new_parameters()
    opt = GuardedOptimizer(
        torch.optim.AdamW(a, fused=True), nonfinite="propagate", max_norm=max_norm
    )
    alone = torch.optim.AdamW(b, fused=True)
    for step in range(3):
        for parameters in (a, b):
            give_gradients(parameters, step)
            if value is not None:
                poison(parameters, value)
        opt.step(loss=NAN)
        torch.nn.utils.clip_grad_norm_(b, max_norm)
        alone.step()
        for x, y in zip(grads_of(a), grads_of(b), strict=True):
            if value is None and max_norm == 1e-2:
                torch.testing.assert_close(x, y, rtol=2 * scale_rtol(torch.float32), atol=0.0)
            else:
                assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
                assert torch.equal(x.signbit(), y.signbit()) or x.isnan().any()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert opt.skipped_steps == 0
    assert bool(a[-1].isnan()) == (value is not None)


def test_propagate_records_a_nan_coefficient_as_a_change():
    _, opt = one(1.0, NAN, nonfinite="propagate", max_norm=1.0)
    opt.step()
    record = opt.records()[0]
    assert math.isnan(record.clip_coef)
    assert (record.action, record.reason, record.nan) == ("clipped", "nonfinite_grad", 1)


@pytest.mark.parametrize("max_norm", [None, INF])
@pytest.mark.parametrize("mode", ["skip", "zero", "raise", "propagate"])
def test_without_a_limit_nothing_is_ever_multiplied(mode, max_norm):
    p, opt = one(3e30, -4e30, nonfinite=mode, max_norm=max_norm)
    opt.step()
    assert p.tolist() == torch.tensor([-3e30, 4e30]).tolist()
    assert opt.records()[0].total_norm == pytest.approx(5e30, rel=NORM_RTOL)
    if mode == "propagate":  # torch turns every gradient NaN here
        p.grad = torch.tensor([1.0, INF])
        opt.step()
        assert p.grad.tolist() == [1.0, INF]


def test_a_large_finite_gradient_is_clipped_and_not_called_nonfinite():
    """Its square overflows float32: others call that Inf and lose the step."""
    p, opt = one(1e20, 1e20, max_norm=1.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -math.sqrt(0.5)))
    assert opt.records()[0].reason is None


# Scopes and limits.


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_scopes_equal_torch_on_the_parts(scope, norm_type, flat):
    a, b = new_parameters(), new_parameters()
    groups = [{"params": a[:1]}, {"params": a[1:]}]
    opt = sgd(groups, max_norm=1.5, norm_type=norm_type, clip_scope=scope, flat_buckets=flat)
    parts = {"global": [b], "group": [b[:1], b[1:]], "tensor": [[p] for p in b]}[scope]
    alone = torch.optim.SGD(b, lr=1.0)
    for step in range(3):
        give_gradients(a, step)
        give_gradients(b, step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in b], norm_type)
        opt.step()
        coefs = [1.5 / torch.nn.utils.clip_grad_norm_(p, 1.5, norm_type).item() for p in parts]
        alone.step()
        record = opt.records()[0]
        assert record.clip_coef == pytest.approx(min(1.0, *coefs), rel=1e-5)
        assert record.total_norm == pytest.approx(norm.item(), rel=1e-6)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_param_group_may_have_a_limit_of_its_own():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [
        {"params": [a], "max_norm": 0.5},
        {"params": [b]},
        {"params": [c], "max_norm": INF},
    ]
    opt = sgd(groups, max_norm=2.0, clip_scope="group")
    for p in (a, b, c):
        p.grad = torch.tensor([10.0])
    opt.step()
    assert [-p.item() for p in (a, b, c)] == pytest.approx([0.5, 2.0, 10.0], rel=1e-5)
    record = opt.records()[0]
    assert record.clip_coef == pytest.approx(0.05, rel=1e-5)
    assert record.total_norm == pytest.approx(math.sqrt(300), rel=NORM_RTOL)


def test_limits_may_change_between_steps():
    p, opt = one(4.0, max_norm=2.0)
    opt.step()
    opt.max_norm = 1.0
    p.grad = torch.tensor([4.0])
    opt.step()
    assert p.item() == pytest.approx(-3.0, rel=1e-5)
    opt.max_norm = -1.0
    with pytest.raises(ValueError, match=r"max_norm=-1.0 must be >= 0"):
        opt.step()
    assert p.item() == pytest.approx(-3.0, rel=1e-5)


def test_a_bad_segment_skips_the_whole_step():
    parameters = new_parameters()
    opt = sgd([{"params": parameters[:2]}, {"params": parameters[2:]}], clip_scope="group")
    give_gradients(parameters, 0)
    poison(parameters, at=0)
    before = snapshot(opt)
    opt.step()
    assert_same_bits(snapshot(opt), before)


def test_clip_value_clamps_before_the_norm_and_lets_nan_be_found():
    p, opt = one(5.0, -5.0, 0.5, max_norm=1.0)
    opt.param_groups[0]["clip_value"] = 1.0
    opt.step()
    assert opt.records()[0].total_norm == 1.5
    torch.testing.assert_close(p.detach(), torch.tensor([-1.0, 1.0, -0.5]) / 1.5)
    for bad, counts in ((NAN, (1, 0, 0)), (INF, (0, 1, 0)), (-INF, (0, 0, 1))):
        p.grad = torch.tensor([5.0, bad, 0.5])
        before = p.detach().clone()
        opt.step()
        record = opt.records()[0]
        assert record.action == "skipped"
        assert (record.nan, record.posinf, record.neginf) == counts
        assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_clip_value_of_other_dtypes_equals_torch(dtype):
    a, b = new_parameters(dtype=dtype), new_parameters(dtype=dtype)
    opt = sgd([{"params": a[:2], "clip_value": 0.3}, {"params": a[2:]}])
    give_gradients(a, 0)
    give_gradients(b, 0)
    opt.step()
    torch.nn.utils.clip_grad_value_(b[:2], 0.3)
    torch.optim.SGD(b, lr=1.0).step()
    assert all(map(torch.equal, a, b))


def test_clip_value_refuses_complex_gradients():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.ones(2, dtype=torch.complex64)
    opt = sgd([{"params": [p], "clip_value": 0.5}])
    with pytest.raises(TypeError, match="complex; use max_norm"):
        opt.step()
    assert torch.equal(p, torch.zeros_like(p))


def test_complex_and_mixed_dtypes_have_one_norm():
    shapes = [(2,), (2,), (2,)]
    dtypes = (torch.complex64, torch.float64, torch.bfloat16)
    parameters = [
        torch.nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)
    ]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    parameters[0].grad = torch.full((2,), 2.0j, dtype=torch.complex64)
    opt = sgd(parameters, max_norm=1.0)
    opt.step()
    assert opt.records()[0].total_norm == pytest.approx(math.sqrt(24), rel=NORM_RTOL)
    coef = 1 / (math.sqrt(24) + 1e-6)
    assert parameters[0][0].item().imag == pytest.approx(-2 * coef, rel=1e-6)
    assert parameters[1][0].item() == pytest.approx(-2 * coef, rel=1e-6)
    parameters[0].grad = torch.tensor([1.0, complex(0.0, NAN)], dtype=torch.complex64)
    opt.step()
    assert opt.records()[0].nan == 1


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    dense = torch.nn.Parameter(torch.ones(2))
    for flat in (False, True):
        groups = [{"params": [dense], "clip_value": 0.1}, {"params": embedding.parameters()}]
        embedding.weight.grad = None
        opt = sgd(groups, flat_buckets=flat, named_parameters=embedding.named_parameters())
        embedding.weight.grad = None
        embedding(torch.tensor([1])).sum().backward()
        dense.grad = torch.ones(2)
        with pytest.raises(TypeError, match="sparse"):
            opt.step()
        assert dense.grad.tolist() == [1.0, 1.0]
        assert opt.applied_steps == 0


# Losses.


@pytest.mark.parametrize("mode", ["skip", "zero"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_nonfinite_loss_skips_whatever_the_gradients(mode, bad):
    p, opt = one(1.0, nonfinite=mode)
    opt.step(loss=torch.tensor(bad))
    record = opt.records()[0]
    assert p.item() == 0.0
    assert (record.action, record.reason) == ("skipped", "nonfinite_loss")
    assert str(record.losses["loss"]) == str(bad)
    assert "loss=" in str(record)


def test_a_loss_in_a_dict_is_named():
    p, opt = one(1.0)
    opt.step(loss={"ce": torch.tensor([[2.0]]), "aux": torch.tensor(NAN), "n": 3})
    record = opt.records()[0]
    assert record.losses["ce"] == 2.0
    assert record.losses["n"] == 3.0
    assert "aux=nan" in str(record)
    assert "ce=" not in str(record)
    assert p.item() == 0.0


def test_observed_micro_batches_count_together():
    p, opt = one(1.0)
    for value in (1.0, 2.0, 6.0):
        opt.observe(torch.tensor(value))
    opt.step()
    assert opt.records()[0].losses == {"loss": 3.0}
    opt.observe({"loss": 1.0, "aux": 5.0})
    opt.observe({"loss": NAN, "aux": 7.0})
    opt.step(loss=4.0)
    record = opt.records()[0]
    assert (record.action, record.losses["aux"]) == ("skipped", 6.0)
    assert p.item() == -1.0
    opt.step(loss=1.0)  # nothing of the bad micro-batch is left
    assert opt.records()[0].losses == {"loss": 1.0}
    assert p.item() == -2.0


def test_a_closure_gives_gradients_and_loss():
    p, opt = one(0.0)

    def closure():
        p.grad = torch.tensor([2.0])
        assert torch.is_grad_enabled()
        return torch.tensor(7.0)

    assert opt.step(closure) == 7.0
    assert opt.records()[0].losses == {"loss": 7.0}
    assert opt.step(closure, loss={"mine": 1.0}) == 7.0
    assert opt.records()[0].losses == {"mine": 1.0}
    assert p.item() == -4.0


def test_a_graph_is_not_kept_alive_by_an_observed_loss():
    p, opt = one(1.0)
    loss = (p * 2).sum()
    opt.observe(loss)
    assert not any(getattr(v, "requires_grad", False) for v in opt._observed._sums.values())


# Spikes.


def steps_with(opt, p, norms, loss=None):
    for norm in norms:
        p.grad = torch.tensor([float(norm)])
        opt.step(loss=loss)
    return opt.records()


def test_a_gradient_spike_is_skipped_after_the_warmup():
    p, opt = one(1.0, spike=SpikeRule(window=8, warmup=4, sigma=6.0))
    records = steps_with(opt, p, [1.0, 1.1, 1000.0, 1.2, 0.9])
    assert [r.action for r in records] == ["applied"] * 5  # not judged yet
    p, opt = one(1.0, spike=SpikeRule(window=8, warmup=4, sigma=6.0))
    records = steps_with(opt, p, [1.0, 1.1, 1.2, 0.9, 1000.0, 1.0])
    assert [r.action for r in records] == ["applied"] * 4 + ["skipped", "applied"]
    spike = records[4]
    assert (spike.reason, spike.spikes) == ("grad_spike", ("grad_norm",))
    values = torch.tensor([1.0, 1.1, 1.2, 0.9], dtype=torch.float32).double()
    expected = values.mean() + 6.0 * values.std(correction=0)
    assert spike.thresholds["grad_norm"] == pytest.approx(expected.item(), rel=1e-6)
    assert records[0].thresholds["grad_norm"] == INF


def test_a_spike_may_be_clipped_to_its_threshold():
    rule = SpikeRule(window=8, warmup=4, sigma=6.0, action="clip")
    p, opt = one(1.0, spike=rule, max_norm=100.0)
    steps_with(opt, p, [1.0, 1.1, 1.2, 0.9])
    before = p.item()
    (record,) = steps_with(opt, p, [1000.0])
    assert (record.action, record.reason) == ("clipped", "grad_spike")
    assert before - p.item() == pytest.approx(record.thresholds["grad_norm"], rel=1e-5)


def test_a_spike_may_only_be_recorded():
    p, opt = one(1.0, spike=Threshold(max=2.0, action="record"))
    (record,) = steps_with(opt, p, [5.0])
    assert (record.action, record.reason, record.spikes) == (
        "applied",
        "grad_spike",
        ("grad_norm",),
    )
    assert p.item() == -5.0


def test_a_threshold_judges_from_the_first_step_and_never_locks_out_what_is_below():
    p, opt = one(1.0, spike={"grad_norm": Threshold(max=10.0), "ce": Threshold(max=3.0)})
    records = steps_with(opt, p, [11.0, 10.0])
    assert [r.action for r in records] == ["skipped", "applied"]
    opt.step(loss={"ce": 3.5})
    opt.step(loss={"ce": 3.0})
    opt.step(loss={"other": 99.0})
    records = opt.records()
    assert [r.action for r in records] == ["skipped", "applied", "applied"]
    assert (records[0].reason, records[0].spikes) == ("loss_spike", ("ce",))
    assert "ce=3.5 > 3" in str(records[0])


def test_losses_have_baselines_of_their_own():
    rules = {
        "a": SpikeRule(window=4, warmup=2, sigma=3.0),
        "b": SpikeRule(window=4, warmup=2, sigma=3.0),
    }
    _, opt = one(1.0, spike=rules)
    for _ in range(3):
        opt.step(loss={"a": 1.0, "b": 100.0})
    opt.step(loss={"a": 100.0, "b": 100.0})
    assert opt.records()[-1].spikes == ("a",)


def test_one_nan_loss_does_not_lock_out_what_follows():
    """Elsewhere a NaN enters the window, and 128 steps compare false with it."""
    rules = {"grad_norm": SpikeRule(window=8, warmup=4), "loss": SpikeRule(window=8, warmup=4)}
    p, opt = one(1.0, spike=rules)
    steps_with(opt, p, [1.0] * 6, loss=2.0)
    steps_with(opt, p, [1.0], loss=NAN)
    steps_with(opt, p, [NAN], loss=2.0)
    windows = opt.state_dict()["fastguard"]["windows"]
    assert windows.isfinite().all()
    records = steps_with(opt, p, [1.0] * 10, loss=2.0)
    assert {r.action for r in records} == {"applied"}
    (spike,) = steps_with(opt, p, [1e4], loss=2.0)
    assert spike.action == "skipped"  # and the rules still judge


def test_a_nan_norm_is_never_taken_for_a_small_one():
    """`nan > threshold` is False; the counts decide, not the comparison."""
    p, opt = one(1.0, spike=Threshold(max=10.0))
    (record,) = steps_with(opt, p, [NAN])
    assert (record.action, record.reason) == ("skipped", "nonfinite_grad")


def test_a_lasting_shift_of_level_becomes_the_new_baseline():
    p, opt = one(1.0, spike=SpikeRule(window=4, warmup=2, sigma=3.0))
    steps_with(opt, p, [1.0] * 4)
    records = steps_with(opt, p, [50.0] * 40)
    skipped = [r.action for r in records].index("applied")
    assert skipped <= 8
    assert {r.action for r in records[-20:]} == {"applied"}


# Budget.


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_the_skip_budget_raises_and_never_accepts_the_nan(fused):
    parameters = new_parameters()
    opt = GuardedOptimizer(
        torch.optim.AdamW(parameters, fused=fused),
        max_consecutive_skips=2,
        named_parameters=[(f"w{i}", p) for i, p in enumerate(parameters)],
    )
    before = snapshot(opt)
    for step in range(2):
        give_gradients(parameters, step)
        poison(parameters)
        opt.step()
    for attempt in range(2):
        with pytest.raises(TrainingDivergedError, match="max_consecutive_skips=2") as error:
            opt.step()
        assert f"{3 + attempt} steps in a row" in str(error.value)
        assert "w3 (1 NaN)" in str(error.value)
        assert error.value.culprits == [("w3", 1, 0, 0)]
    after = snapshot(opt)
    assert_same_bits({k: after[k] for k in before}, before)
    assert opt.consecutive_skips == 4
    give_gradients(parameters, 5)
    opt.step()
    assert opt.consecutive_skips == 0


def test_an_applied_step_resets_the_budget():
    p, opt = one(1.0, max_consecutive_skips=1)
    for norm in (NAN, 1.0, NAN, 1.0, NAN, 1.0):
        steps_with(opt, p, [norm])
    assert (opt.applied_steps, opt.skipped_steps) == (3, 3)


# Saying so.


def test_the_logger_says_once_what_is_guarded_and_each_incident_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="fastguard"):
        p, opt = one(1.0, max_norm=2.5, spike=Threshold(max=7.0))
        (start,) = caplog.records
        assert start.levelno == logging.INFO
        for word in ("SGD", "1 tensors", "max_norm=2.5", "skip", "Threshold(max=7.0", "cpu"):
            assert word in start.getMessage()
        caplog.clear()
        for value in (1.0, 3.0, NAN, 9.0):
            p.grad = torch.tensor([value])
            opt.step(tag="batch")
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2  # clipping is no incident
    assert all(r.levelno == logging.WARNING and "\n" not in r.getMessage() for r in caplog.records)
    assert "step 3 skipped (tag batch) because of nonfinite_grad" in messages[0]
    assert "grad_norm=9 > 7" in messages[1]


def test_last_is_a_snapshot_on_the_device():
    _, opt = one(3.0, 4.0, max_norm=1.0)
    assert opt.last is None
    opt.step()
    assert opt.last.total_norm.item() == 5.0
    assert opt.last.clip_coef.item() == pytest.approx(0.2, rel=1e-5)
    assert opt.last.found_inf.dtype == torch.float32
    assert opt.last.found_inf.item() == 0.0
