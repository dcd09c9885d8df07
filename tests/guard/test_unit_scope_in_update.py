"""`clip_scope="unit"` in the update of `fastguard.optim`: the same weights as clipping in place."""

import math

import pytest
import torch

import fastguard.optim as fused
from fastguard import AGC, GuardedOptimizer, Threshold
from fastguard.guard.unit_clipping import UnitClipping
from guardtest.agc import parameters
from guardtest.updates import same_bits

NAN, INF = math.nan, math.inf


PAPER = AGC()


def guarded(ps, agc=PAPER, inner=None, **options):
    inner = inner or torch.optim.SGD(ps, lr=1.0)
    return GuardedOptimizer(inner, max_norm=agc, clip_scope="unit", **options)


UPDATES = {
    "adamw": (fused.AdamW, {}),
    "reproducible": (fused.AdamW, {"reproducible": True}),
    "sgd": (fused.SGD, {"momentum": 0.9}),
    "lion": (fused.Lion, {}),
    "master": (fused.AdamW, {"master": "float32"}),
    "remainder": (fused.AdamW, {"master": "remainder"}),
}


def both_ways(monkeypatch, kind, dtype=torch.float32, layout=None, prepare=None, **options):
    """Takes three steps with clipping in the update and in place; returns weights and records."""
    make, settings = UPDATES[kind]
    results = []
    for in_place in (False, True):
        if in_place:
            monkeypatch.setattr(UnitClipping, "_is_in_update", lambda *_: False)
        ps = parameters(dtype)
        if layout is not None:
            for p in ps:
                p.data = layout(p.data)
        opt = guarded(ps, inner=make(ps, lr=0.01, **settings), **options)
        for step in range(3):
            for i, p in enumerate(ps):
                torch.manual_seed(10 * step + i)
                p.grad = (torch.randn(p.shape, dtype=torch.float64) * 10.0 ** (i % 4 - 3)).to(dtype)
            if prepare is not None and step == 1:
                prepare(ps)
            before = [p.grad.clone() for p in ps]
            opt.step()
            if not in_place:
                assert all(map(same_bits, before, [p.grad for p in ps]))
        monkeypatch.undo()
        results.append((ps, opt.records()))
    return results


def outcome(record):
    return record.action, record.reason, record.clip_coef, record.total_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["adamw", "reproducible", "sgd", "lion"])
def test_clipping_in_the_update_equals_clipping_in_place(monkeypatch, kind, dtype):
    (ours, records), (theirs, others) = both_ways(monkeypatch, kind, dtype)
    assert all(map(same_bits, ours, theirs))
    assert list(map(outcome, records)) == list(map(outcome, others))
    assert [r.action for r in records] == ["clipped"] * 3


@pytest.mark.parametrize("kind", ["reproducible", "master", "remainder"])
def test_bfloat16_gradients_are_not_rounded_once_more(monkeypatch, kind):
    (ours, records), (theirs, others) = both_ways(monkeypatch, kind, torch.bfloat16)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)
    for r, o in zip(records, others, strict=True):
        assert r.action == o.action and r.clip_coef == pytest.approx(o.clip_coef, rel=0.02)


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_gradients_in_both_ways(monkeypatch, nonfinite, bad):
    def spoil(ps):
        ps[6].grad[1, 5] = bad

    (ours, records), (theirs, others) = both_ways(
        monkeypatch, "reproducible", prepare=spoil, nonfinite=nonfinite
    )
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
    assert str(list(map(outcome, records))) == str(list(map(outcome, others)))  # NaN is not NaN


def test_channels_last_is_clipped_in_the_update(monkeypatch):
    def layout(x):
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    (ours, _), (theirs, _) = both_ways(monkeypatch, "reproducible", layout=layout)
    assert all(map(same_bits, ours, theirs))


@pytest.mark.parametrize(
    ("settings", "options", "weight"),
    [
        ({}, {"norm_type": 1.0}, torch.ones(2, 4)),
        ({"update_clipping": True}, {}, torch.ones(2, 4)),
        ({}, {}, torch.ones(4, 2).t()),
    ],
    ids=["norm", "update clipping", "transposed"],
)
def test_other_cases_are_clipped_in_place(settings, options, weight):
    p = torch.nn.Parameter(weight)
    opt = guarded([p], inner=fused.AdamW([p], **settings), **options)
    p.grad = torch.ones(2, 4)
    opt.step()
    assert p.grad.max() < 0.02
    assert opt.records()[0].action == "clipped"


def test_the_update_unscales_and_applies_spike_rules():
    p, q = (torch.nn.Parameter(torch.ones(2, 4)) for _ in range(2))
    rule = Threshold(1.0, "clip")
    ours = guarded([p], inner=fused.SGD([p], lr=1.0), spike=rule)
    theirs = guarded([q], spike=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    p.grad, q.grad = torch.full((2, 4), 1024.0), torch.ones(2, 4)
    scaler.step(ours)
    theirs.step()
    assert (p.grad == 1024.0).all()
    torch.testing.assert_close(p, q)
    assert outcome(ours.records()[0]) == pytest.approx(outcome(theirs.records()[0]))
    assert ours.last.clip_coef.item() == pytest.approx(theirs.last.clip_coef.item())
    assert ours.last.units is None  # the limits were applied


def test_an_error_after_the_update_leaves_a_complete_record():
    p = torch.nn.Parameter(torch.ones(2, 4))
    inner = fused.SGD([p], lr=1.0)

    def fail(*_):
        raise KeyboardInterrupt

    opt = guarded([p], inner=inner)
    inner.register_step_post_hook(fail)
    p.grad = torch.ones(2, 4)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    (record,) = opt.records()
    assert record.action == "clipped" and record.clip_coef == pytest.approx(0.01)
