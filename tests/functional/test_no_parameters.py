"""Gradients passed instead of parameters cause an error or a warning."""

import warnings

import pytest
import torch
from torch import nn

import fastguard
from guardtest.grads import parameters

NAN = float("nan")


def raw():
    return [torch.tensor([30.0, NAN]), torch.tensor([40.0])]


def with_graph():
    """Returns gradients with a graph, which require grad but never get a `.grad`."""
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    return list(torch.autograd.grad((x**3).sum(), [x], create_graph=True))


GIVEN = {
    "gradients": raw,
    "one gradient": lambda: raw()[0],
    "pairs": lambda: list(zip("ab", raw(), strict=True)),
    "a generator": lambda: (g for g in raw()),
    "a tuple of autograd.grad": with_graph,
    "frozen parameters": lambda: list(nn.Linear(2, 2).requires_grad_(False).parameters()),
}
OURS = {
    "raise": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="raise"),
    "zero": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="zero"),
    "sanitize_grads_": fastguard.sanitize_grads_,
    "sanitize_grads_ 1": lambda ps: fastguard.sanitize_grads_(ps, nan=1.0),
    "measure_grads": fastguard.measure_grads,
    "measure_grads each": lambda ps: fastguard.measure_grads(ps, per_tensor=True),
}
DROP_INS = {
    "clip_grad_norm_": lambda ps: fastguard.clip_grad_norm_(ps, 1.0),
    "error_if_nonfinite": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True),
    "clip_grads_with_norm_": lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.tensor(9.0)),
    "clip_grad_value_": lambda ps: fastguard.clip_grad_value_(ps, 1.0),
}
ignore_non_leaves = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@ignore_non_leaves
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("function", OURS)
def test_functions_that_torch_lacks_refuse_gradients(function, given):
    with pytest.raises(TypeError, match=r"has a \.grad or requires grad.*model\.parameters\(\)"):
        OURS[function](GIVEN[given]())


@ignore_non_leaves
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("function", DROP_INS)
def test_drop_in_functions_do_nothing_as_in_torch_but_warn_at_the_callers_line(function, given):
    with pytest.warns(UserWarning, match=r"model\.parameters\(\)") as told:
        result = DROP_INS[function](GIVEN[given]())
    assert result is None or result == 0.0
    ours = [w for w in told if "model.parameters()" in str(w.message)]
    assert {w.filename for w in ours} == {__file__}


def test_the_warning_is_given_once_per_line():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            fastguard.clip_grad_norm_(raw(), 1.0)
    assert len(told) == 1


def test_the_error_is_raised_in_compiled_code_too():
    torch._dynamo.reset()
    for function in (OURS["raise"], fastguard.measure_grads, fastguard.sanitize_grads_):
        with pytest.raises(TypeError, match=r"model\.parameters\(\)"):
            torch.compile(function, backend="aot_eager")(raw())
    compiled = torch.compile(DROP_INS["clip_grad_norm_"], fullgraph=True, backend="aot_eager")
    assert compiled(raw()) == 0.0


def retaining():
    x = nn.Parameter(torch.ones(2))
    y = x * 2
    y.retain_grad()
    return [y]


@pytest.mark.parametrize(
    "given",
    [
        list,
        lambda: parameters(None, None),
        lambda: [*parameters(None), torch.zeros(2)],
        lambda: [*nn.Linear(2, 2).requires_grad_(False).parameters(), *parameters(None)],
        retaining,
    ],
    ids=["none", "before backward", "one that may", "partly frozen", "a retained gradient"],
)
def test_a_step_without_gradients_is_not_an_error(given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in {**OURS, **DROP_INS}.values():
            function(given())


def test_frozen_parameters_that_still_hold_gradients_are_clipped():
    p = nn.Parameter(torch.zeros(2), requires_grad=False)
    p.grad = torch.tensor([3.0, 4.0])
    assert fastguard.clip_grad_norm_([p], 1.0, nonfinite="raise") == 5.0


@ignore_non_leaves
@pytest.mark.parametrize("given", [raw, with_graph])
def test_flat_buckets_refuse_gradients(given):
    with pytest.raises((TypeError, ValueError), match=r"not their gradients"):
        fastguard.FlatGradBuckets(given())
