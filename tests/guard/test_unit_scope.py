"""`clip_scope="unit"`: adaptive gradient clipping in a guarded step."""

import copy
import math

import pytest
import torch

import fastguard
import fastguard.optim as fused
from fastguard import AGC, GuardedOptimizer, Threshold, ZClip
from guardtest.agc import assert_clipped, expected, parameters
from guardtest.guarded import sgd
from guardtest.training import assert_same_bits, snapshot

NAN, INF = math.nan, math.inf


PAPER = AGC()


def guarded(ps, agc=PAPER, inner=None, **options):
    inner = inner or torch.optim.SGD(ps, lr=1.0)
    return GuardedOptimizer(inner, max_norm=agc, clip_scope="unit", **options)


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "raise", "propagate"])
def test_a_step_uses_the_clipped_gradients(nonfinite):
    ps = parameters()
    wanted = [expected(p.grad, p) for p in ps]
    before = [p.detach().clone() for p in ps]
    norm = torch.cat([p.grad.flatten() for p in ps]).double().norm().item()
    opt = guarded(ps, nonfinite=nonfinite)
    opt.step()
    assert_clipped([p.grad for p in ps], wanted)
    for p, old in zip(ps, before, strict=True):
        assert torch.equal(p.detach(), old - p.grad)
    (record,) = opt.records()
    assert record.action == "clipped" and 0 < record.clip_coef < 1
    assert record.total_norm == pytest.approx(norm, rel=1e-6)


def one(**options):
    p = torch.nn.Parameter(torch.ones(2, 4))
    p.grad = torch.ones(2, 4)
    p.grad[1] = 0.004
    return p, guarded([p], **options)


def test_the_record_holds_the_smallest_coefficient():
    p, opt = one()
    opt.step()
    p.grad = torch.full((2, 4), 1e-3)
    opt.step()
    assert [(r.action, r.clip_coef) for r in opt.records()] == [
        ("clipped", pytest.approx(0.01)),
        ("applied", 1.0),
    ]


def seen_layers(inner):
    """Returns two layers and their guard. One unit of the second layer is clipped most."""
    first = torch.nn.Parameter(torch.ones(3, 4))
    bias = torch.nn.Parameter(torch.ones(3))
    second = torch.nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
    left_out = torch.nn.Parameter(torch.ones(2, 2))
    named = {"first": first, "left_out": left_out, "bias": bias, "second": second}
    for p in named.values():
        p.grad = torch.full_like(p, 1e-3)
    first.grad[1] = 1.0
    second.grad[3] = 50.0
    left_out.grad.fill_(1e9)
    opt = guarded(
        list(named.values()),
        AGC(exclude=["left_out"]),
        inner(list(named.values())),
        named_parameters=named.items(),
    )
    return named, opt


INNER = {
    "in place": lambda ps: torch.optim.SGD(ps, lr=1e-3),
    "in the update": lambda ps: fused.SGD(ps, lr=1e-3),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_record_says_how_many_units_were_clipped_and_which_most(inner):
    named, opt = seen_layers(inner)
    opt.step()
    for p in named.values():
        p.grad = torch.full_like(p, 1e-3)
    opt.step()
    named["second"].grad[0, 0] = NAN
    opt.step()
    clipped, applied, skipped = opt.records()
    assert (clipped.clipped_units, clipped.limited_units) == (2, 9)
    assert clipped.most_clipped_unit == ("second", 3)
    assert clipped.clip_coef == pytest.approx(0.01 / 50)
    assert (applied.clipped_units, applied.limited_units) == (0, 9)
    assert (skipped.clipped_units, skipped.limited_units) == (0, 0)
    assert applied.most_clipped_unit is skipped.most_clipped_unit is None


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_a_nan_unit_is_the_most_clipped_one(inner):
    named, opt = seen_layers(inner)
    opt.nonfinite = "propagate"
    named["first"].grad[2, 1] = NAN
    opt.step()
    (record,) = opt.records()
    assert record.clipped_units == 3 and record.most_clipped_unit == ("first", 2)
    assert math.isnan(record.clip_coef)


def test_other_limits_have_no_units_in_their_records():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = sgd([p], max_norm=1.0)
    opt.step()
    (record,) = opt.records()
    assert (record.clipped_units, record.limited_units, record.most_clipped_unit) == (0, 0, None)


@pytest.mark.parametrize("kind", ["fused", "plain", "flat buckets", "flat parameters"])
def test_a_skipped_step_changes_nothing(kind):
    ps = [p for p in parameters() if p.numel()]
    inner = torch.optim.AdamW(ps, lr=0.1, fused=kind != "plain")
    flat = {kind.replace(" ", "_"): True} if kind.startswith("flat") else {}
    opt = guarded(ps, inner=inner, **flat)
    opt.step()
    for p in ps:
        p.grad.fill_(10.0)
    ps[4].grad.view(-1)[0] = NAN
    before, grads = snapshot(opt), [p.grad.clone() for p in ps]
    opt.step()
    assert_same_bits(snapshot(opt), before)
    assert opt.skipped_steps == 1
    for p, grad in zip(ps, grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)
    assert [r.action for r in opt.records()] == ["clipped", "skipped"]


@pytest.mark.parametrize("kind", ["fused", "plain", "flat_buckets", "flat_parameters"])
def test_all_steppers_take_the_same_step(kind):
    ps, others = (
        [p for p in parameters() if p.numel()],
        [p for p in parameters() if p.numel()],
    )
    fastguard.clip_grad_adaptive_(others)
    torch.optim.AdamW(others, lr=0.1, fused=True).step()
    inner = torch.optim.AdamW(ps, lr=0.1, fused=kind != "plain")
    guarded(ps, inner=inner, **({kind: True} if kind.startswith("flat") else {})).step()
    for p, other in zip(ps, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-6, atol=1e-7)


def test_zero_mode_clips_by_the_finite_elements():
    p, opt = one(nonfinite="zero")
    p.grad[0, 0] = NAN
    wanted = expected(torch.where(p.grad.isfinite(), p.grad, 0.0), p)
    opt.step()
    assert_clipped([p.grad], [wanted])
    assert opt.records()[0].action == "sanitized"


def test_propagate_does_not_affect_other_units():
    p, opt = one(nonfinite="propagate")
    p.grad[0, 0] = NAN
    opt.step()
    assert p.grad[0].isnan().all()
    torch.testing.assert_close(p.grad[1], torch.full((4,), 0.004))


def test_limits_apply_to_unscaled_gradients():
    """The gradients are scaled by 1024; the limit applies to the unscaled ones."""
    p, opt = one()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    q, other = one()
    p.grad.mul_(1024.0)
    scaler.step(opt)
    other.step()
    torch.testing.assert_close(p, q)
    assert opt.records()[0].clip_coef == pytest.approx(0.01)


def test_excluded_modules_are_measured_but_not_clipped():
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 2)})
    for p in net.parameters():
        p.grad = torch.full_like(p, 10.0)
    opt = GuardedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.0),
        max_norm=AGC(exclude=["head"]),
        clip_scope="unit",
        named_parameters=net.named_parameters(),
    )
    opt.step()
    assert (net["head"].weight.grad == 10.0).all() and net["body"].weight.grad.max() < 1.0
    assert opt.records()[0].total_norm == pytest.approx(10.0 * math.sqrt(20))


def test_an_exclusion_that_matches_nothing_is_refused_at_construction():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'head', which matches no parameter"):
        guarded([p], AGC(exclude=("head",)))


def test_parameters_added_later_are_clipped():
    _, opt = one()
    q = torch.nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [q]})
    q.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(q.grad, torch.full((3,), 0.01))


def test_spike_rules_and_clip_values_can_be_combined_with_agc():
    _, opt = one(spike=Threshold(1.0, "clip"))
    opt.param_groups[0]["clip_value"] = 0.75
    opt.step()
    (record,) = opt.records()
    assert record.total_norm == pytest.approx(math.sqrt(4 * 0.75**2 + 4 * 0.004**2))
    assert record.clip_coef == pytest.approx(0.02 / 1.5 / record.total_norm, rel=1e-4)


def test_copies_and_state_dicts():
    p, opt = one()
    opt.step()
    twin = copy.deepcopy(opt)
    twin.load_state_dict(opt.state_dict())
    (q,) = twin.param_groups[0]["params"]
    for t in (p, q):
        t.grad = torch.ones(2, 4)
    opt.step()
    twin.step()
    assert torch.equal(p, q) and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"max_norm": 1.0, "clip_scope": "unit"},
            r"fastguard.AGC\(\), but max_norm=1.0;",
        ),
        ({"clip_scope": "unit"}, r"fastguard.AGC\(\), but max_norm=None"),
        (
            {"max_norm": ZClip(), "clip_scope": "unit"},
            r"fastguard.AGC\(\), but max_norm=ZClip",
        ),
        ({"max_norm": AGC()}, "clip_scope='global'; pass clip_scope='unit'"),
        ({"max_norm": AGC(), "clip_scope": "tensor"}, "clip_scope='tensor'; pass clip_scope"),
    ],
)
def test_agc_and_the_unit_scope_require_each_other(options, text):
    with pytest.raises(ValueError, match=text):
        sgd([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"clip_factor": 0}, ValueError, "AGC clip_factor=0 must be a finite number > 0"),
        ({"eps": NAN}, ValueError, "AGC eps=nan"),
        ({"eps": "1"}, TypeError, "AGC eps='1'"),
        ({"exclude": "head"}, TypeError, "AGC exclude='head' must be a list of names"),
        ({"exclude": [torch.ones(1)]}, TypeError, "must be a list of names"),
    ],
)
def test_bad_settings(arguments, error, text):
    with pytest.raises(error, match=text):
        AGC(**arguments)


def test_the_class_instead_of_a_rule_is_refused():
    with pytest.raises((TypeError, ValueError), match=r"AGC"):
        sgd([torch.nn.Parameter(torch.ones(1))], max_norm=AGC, clip_scope="unit")


def test_lbfgs_warns_that_agc_has_no_effect(caplog):
    p = torch.nn.Parameter(torch.ones(1))
    opt = guarded([p], inner=torch.optim.LBFGS([p], max_iter=2))

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert "max_norm=AGC(" in caplog.text and "has no effect" in caplog.text
    assert opt.records()[0].clip_coef == 1.0


@pytest.mark.parametrize("make", [torch.optim.SGD, fastguard.optim.SGD])
def test_the_most_clipped_unit_is_named_with_flat_buckets_and_a_frozen_parameter(make):
    named = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("frozen", "calm", "wild")}
    named["frozen"].requires_grad_(False)
    opt = GuardedOptimizer(
        make(list(named.values()), lr=0.1),
        max_norm=AGC(),
        clip_scope="unit",
        flat_buckets=True,
        named_parameters=named.items(),
    )
    named["calm"].grad.fill_(1e-4)
    named["wild"].grad.fill_(1e-4)
    named["wild"].grad[1] = 10.0
    opt.step()
    (record,) = opt.records()
    assert (record.clipped_units, record.most_clipped_unit) == (1, ("wild", 1))
