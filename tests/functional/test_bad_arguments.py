"""Bad arguments: errors name the value and the remedy, and nothing is changed."""

import math

import pytest
import torch
from torch import nn

import fastguard
from guardtest.grads import assert_bitwise_equal, parameters

NAN, INF = math.nan, math.inf

P = "parameters"
BAD = {
    "max_norm negative": (
        lambda ps: fastguard.clip_grad_norm_(ps, -1.0),
        ValueError,
        r"max_norm=-1\.0 must be >= 0.*inf",
    ),
    "max_norm NaN": (
        lambda ps: fastguard.clip_grad_norm_(ps, NAN),
        ValueError,
        "max_norm=nan must be >= 0",
    ),
    "max_norm None": (
        lambda ps: fastguard.clip_grad_norm_(ps, None),
        TypeError,
        "max_norm=None is not a number; use",
    ),
    "max_norm string": (
        lambda ps: fastguard.clip_grad_norm_(ps, "big"),
        TypeError,
        "max_norm='big'",
    ),
    "max_norm tensor": (
        lambda ps: fastguard.clip_grad_norm_(ps, torch.ones(2)),
        TypeError,
        "max_norm=tensor",
    ),
    "max_norm huge": (
        lambda ps: fastguard.clip_grad_norm_(ps, 10**400),
        ValueError,
        "max_norm=1000.*is beyond the largest float",
    ),
    "norm_type zero": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, 0),
        ValueError,
        "norm_type=0 is not a norm; use",
    ),
    "norm_type negative": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, -INF),
        ValueError,
        "norm_type=-inf",
    ),
    "norm_type string": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, "fro"),
        TypeError,
        "norm_type='fro'",
    ),
    "mode skip": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="skip"),
        ValueError,
        "nonfinite='skip'.*GuardedOptimizer",
    ),
    "mode unknown": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="drop"),
        ValueError,
        "use one of propagate, zero, raise",
    ),
    "two modes": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True, nonfinite="zero"),
        ValueError,
        "contradicts",
    ),
    "foreach": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, foreach="yes"),
        TypeError,
        "foreach='yes'",
    ),
    "group": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, group="world"),
        TypeError,
        "group='world'",
    ),
    "total_norm shape": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.ones(2)),
        ValueError,
        r"total_norm .* shape \(2,\)",
    ),
    "total_norm None": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, None),
        TypeError,
        "total_norm=None",
    ),
    "with_norm max_norm": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, -2.0, torch.tensor(1.0)),
        ValueError,
        r"max_norm=-2\.0",
    ),
    "with_norm foreach": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.tensor(1.0), 3),
        TypeError,
        "foreach=3",
    ),
    "clip_value negative": (
        lambda ps: fastguard.clip_grad_value_(ps, -1.0),
        ValueError,
        r"clip_value=-1\.0 must be >= 0.*use float\('inf'\) to clamp nothing",
    ),
    "clip_value NaN": (
        lambda ps: fastguard.clip_grad_value_(ps, NAN),
        ValueError,
        "clip_value=nan",
    ),
    "clip_value string": (
        lambda ps: fastguard.clip_grad_value_(ps, "x"),
        TypeError,
        "clip_value='x'",
    ),
    "get_total_norm p": (
        lambda ps: fastguard.get_total_norm([p.grad for p in ps], -1),
        ValueError,
        "norm_type=-1",
    ),
    "get_total_norm of a number": (
        lambda ps: fastguard.get_total_norm(3),
        TypeError,
        "tensors=3 must be .*list of gradients",
    ),
    "get_total_norm of strings": (lambda ps: fastguard.get_total_norm(["g"]), TypeError, "'g'"),
    "nan fill": (
        lambda ps: fastguard.sanitize_grads_(ps, nan=NAN),
        ValueError,
        "nan=nan must be a finite number",
    ),
    "posinf fill": (lambda ps: fastguard.sanitize_grads_(ps, posinf="0"), TypeError, "posinf='0'"),
    "fill too large": (
        lambda ps: fastguard.sanitize_grads_(ps, neginf=-1e5),
        ValueError,
        r"neginf=-100000\.0 is infinite in torch\.float16",
    ),
    "measure p": (lambda ps: fastguard.measure_grads(ps, norm_type=0), ValueError, "norm_type=0"),
    "a module": (
        lambda ps: fastguard.clip_grad_norm_(nn.Linear(1, 1), 1.0),
        TypeError,
        r"pass model\.parameters\(\)",
    ),
    "a number": (
        lambda ps: fastguard.measure_grads(3),
        TypeError,
        r"parameters=3 must be .*model\.parameters\(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_name_value_and_remedy_and_change_nothing(case):
    call, error, message = BAD[case]
    grads = [torch.tensor([30.0, NAN]), torch.tensor([-INF, 4.0]).half()]
    before = [g.clone() for g in grads]
    with pytest.raises(error, match=f"(?s){message}"):
        call(parameters(*grads))
    for grad, was in zip(grads, before, strict=True):
        assert_bitwise_equal(grad, was)


@pytest.mark.parametrize(
    "call",
    [
        lambda ps: fastguard.clip_grad_value_(ps, 1.0),
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, INF),
        lambda ps: fastguard.measure_grads(ps, norm_type=1.0),
    ],
)
def test_complex_gradients_are_refused_by_name_before_any_change(call):
    real, complex_one = torch.tensor([30.0]), torch.tensor([3 + 4j])
    named = zip(("a", "b"), parameters(real, complex_one), strict=True)
    with pytest.raises(TypeError, match=r"gradient of b is complex.*use"):
        call(list(named))
    assert real.tolist() == [30.0]


LARGE = [nn.Parameter(torch.ones(30, 30)), nn.Parameter(torch.ones(30))]


@pytest.mark.parametrize(
    "call",
    [
        lambda opt: fastguard.clip_grad_norm_([LARGE], 1.0),
        lambda opt: fastguard.get_total_norm([torch.ones(3), LARGE]),
        lambda opt: fastguard.GuardedOptimizer(opt.optimizer, spike=LARGE),
        lambda opt: fastguard.GuardedOptimizer(opt.optimizer, spike={"loss": LARGE}),
        lambda opt: opt.add_param_group({"params": [LARGE]}),
        lambda opt: fastguard.GuardedLR(opt, floor=[0.1] * 1000),
    ],
    ids=["clip", "total_norm", "spike", "spike dict", "add_param_group", "floor"],
)
def test_a_large_wrong_value_is_shortened_to_one_line(call):
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises((TypeError, ValueError)) as raised:
        call(opt)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
