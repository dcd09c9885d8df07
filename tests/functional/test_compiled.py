"""The functions under torch.compile: one graph, the results of eager mode, few recompilations."""

import math
import re

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

import fastguard
import fastguard.functional.adaptive  # defines another op
from fastguard import NonFiniteGradError
from guardtest.grads import assert_bitwise_equal, copies, grads_of, parameters

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_raise(params):
    return fastguard.clip_grad_norm_(params, 1.0, nonfinite="raise")


def stats_fields(stats):
    return (
        stats.power_sum,
        stats.segment_counts,
        stats.counts,
        stats.total_norm,
        stats.segment_norms,
        stats.found_nonfinite,
    )


def named(params):
    return [(f"p{i}", p) for i, p in enumerate(params)]


def present(params):
    return [p.grad for p in params if p.grad is not None]


FUNCTIONS = {
    "clip_grad_norm_": lambda ps: fastguard.clip_grad_norm_(ps, 1.0),
    "clip_grad_norm_ inf": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, INF),
    "clip_grad_norm_ p=3.5": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, 3.5),
    "clip_grad_norm_ max inf": lambda ps: fastguard.clip_grad_norm_(ps, INF),
    "clip_grad_norm_ zero": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="zero"),
    "get_total_norm": lambda ps: fastguard.get_total_norm(present(ps)),
    "get_total_norm inf": lambda ps: fastguard.get_total_norm(present(ps), INF),
    "clip_grads_with_norm_": lambda ps: fastguard.clip_grads_with_norm_(
        ps, 1.0, fastguard.get_total_norm(present(ps))
    ),
    "clip_grad_value_": lambda ps: fastguard.clip_grad_value_(ps, 0.5),
    "clip_grad_value_ 1e6": lambda ps: fastguard.clip_grad_value_(ps, 1e6),
    "sanitize_grads_": lambda ps: stats_fields(fastguard.sanitize_grads_(ps)),
    "sanitize_grads_ 1": lambda ps: stats_fields(
        fastguard.sanitize_grads_(ps, nan=1.0, posinf=2.0)
    ),
    "sanitize_grads_ 1e6": lambda ps: stats_fields(fastguard.sanitize_grads_(ps, posinf=1e6)),
    "measure_grads": lambda ps: stats_fields(fastguard.measure_grads(ps)),
    "measure_grads each": lambda ps: stats_fields(fastguard.measure_grads(ps, per_tensor=True)),
}


GRADS = {
    "clean": lambda: [torch.randn(3, 2), torch.randn(4)],
    "bad": lambda: [None, torch.tensor([3.0, NAN]), None, torch.tensor([4.0, INF, -INF])],
    "mixed dtypes": lambda: [torch.randn(3).double(), torch.randn(2).bfloat16(), torch.randn(2)],
    "fp16": lambda: [torch.tensor([2e6]), torch.tensor([6e4, -INF]).half(), torch.tensor([NAN])],
    "complex": lambda: [torch.tensor([3.0, NAN]), torch.tensor([complex(3, INF), 4j])],
    "all None": lambda: [None, None],
}


def assert_equal(ours, theirs) -> None:
    if isinstance(ours, tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    elif ours is None or theirs is None:
        assert ours is theirs
    else:
        assert_bitwise_equal(ours, theirs)


def result_of(function, params):
    """Returns the result, or the type of the error."""
    try:
        return function(params)
    except (TypeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_is_eager_bit_for_bit(name, grads):
    """Compiled code also raises the same errors as eager code and leaves gradients unchanged."""
    function = FUNCTIONS[name]
    eager = parameters(*GRADS[grads]())
    compiled, before = copies(eager), copies(eager)
    expected = result_of(function, eager)
    got = result_of(torch.compile(function, fullgraph=True, backend="aot_eager"), compiled)
    if isinstance(expected, type):
        assert grads in ("complex", "fp16")
        assert got is expected
        assert_equal(tuple(grads_of(eager)), tuple(grads_of(before)))
    else:
        assert_equal(got, expected)
    assert_equal(tuple(grads_of(compiled)), tuple(grads_of(eager)))


@pytest.mark.parametrize("grads", ["clean", "all None"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_with_dynamic_numbers(name, grads):
    """`dynamic=True` turns Python floats into symbols, including defaults of arguments."""
    eager = parameters(*GRADS[grads]())
    compiled = copies(eager)
    expected = FUNCTIONS[name](eager)
    call = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager", dynamic=True)
    assert_equal(call(compiled), expected)
    assert_equal(tuple(grads_of(compiled)), tuple(grads_of(eager)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"nonfinite": "drop"}, ValueError, "nonfinite='drop'"), ({"foreach": 1}, TypeError, "=1 m")],
)
def test_invalid_choices_are_named_where_the_graph_may_break(options, error, message):
    params = parameters(torch.tensor([3.0, 4.0]))
    call = torch.compile(lambda ps: fastguard.clip_grad_norm_(ps, 1.0, **options))
    with pytest.raises(error, match=message):
        call(params)
    assert params[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("call", [fastguard.measure_grads, fastguard.sanitize_grads_])
@pytest.mark.parametrize("pairs", [False, True])
def test_culprits_keep_their_number_and_name(call, pairs):
    params = parameters(None, torch.tensor([NAN]), None, torch.tensor([INF, 1.0]))
    stats = torch.compile(call, fullgraph=True, backend="aot_eager")(
        named(params) if pairs else params
    )
    names = ["p1", "p3"] if pairs else ["parameter 1", "parameter 3"]
    assert stats.culprits() == [(names[0], 1, 0, 0), (names[1], 0, 1, 0)]


def test_raising_inside_compiled_code_names_the_parameter_and_changes_nothing():
    compiled = torch.compile(with_raise, fullgraph=True, backend="aot_eager")
    for pairs, name in ((True, "p2"), (False, "parameter 2")):
        params = parameters(torch.tensor([9.0]), None, torch.tensor([NAN, INF]))
        with pytest.raises(NonFiniteGradError, match=rf"{name} \(1 NaN, 1 \+Inf\)"):
            compiled(named(params) if pairs else params)
        assert params[0].grad.tolist() == [9.0]
    good = parameters(torch.tensor([3.0, 4.0]))
    assert compiled(good) == 5.0
    assert good[0].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda ps, x: fastguard.clip_grad_norm_(ps, x), "max_norm"),
        (lambda ps, x: fastguard.clip_grads_with_norm_(ps, x, torch.tensor(5.0)), "max_norm"),
        (lambda ps, x: fastguard.clip_grad_value_(ps, x), "clip_value"),
    ],
    ids=["norm", "with_norm", "value"],
)
@pytest.mark.parametrize("limit", [-1.0, NAN])
def test_compiled_limits_are_checked_on_a_cpu(function, message, limit):
    params = parameters(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match=rf"{message}={limit} must be >= 0"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(params, limit)
    assert params[0].grad.tolist() == [3.0, 4.0]


def test_an_iterator_and_a_single_tensor():
    def clip(params):
        return fastguard.clip_grad_norm_(iter(params), 1.0)

    params = parameters(torch.tensor([3.0, 0.0]), torch.tensor([[0.0, -4.0]]))
    assert torch.compile(clip, fullgraph=True, backend="aot_eager")(params) == 5.0
    single = parameters(torch.tensor([3.0, 4.0]))[0]
    clip_one = torch.compile(fastguard.clip_grad_norm_, fullgraph=True, backend="aot_eager")
    assert clip_one(single, 1.0) == 5.0


class Inductor:
    """Runs torch.compile up to the code generation of inductor, and counts the graphs.

    A Python float in a graph causes its recompilation before this point. The C++ compiler would
    take seconds per graph.
    """

    def __init__(self, function) -> None:
        self.graphs = 0
        self.function = torch.compile(function, fullgraph=True, backend=self.backend)

    def __call__(self, *args):
        return self.function(*args)

    def backend(self, graph, inputs):
        self.graphs += 1
        return compile_fx(graph, inputs, inner_compile=lambda g, _, **how: make_boxed_func(g))


@pytest.mark.parametrize(
    "function",
    [
        lambda ps, x: fastguard.clip_grad_norm_(ps, x),
        lambda ps, x: fastguard.clip_grads_with_norm_(ps, x, torch.tensor(100.0)),
        lambda ps, x: fastguard.clip_grads_with_norm_(ps, 1.0, x),
        lambda ps, x: fastguard.clip_grad_value_(ps, x),
    ],
    ids=["norm", "with_norm", "norm given", "value"],
)
@pytest.mark.parametrize(("as_given", "graphs"), [(float, 2), (torch.tensor, 1)])
def test_a_changing_limit_causes_one_recompilation_and_a_tensor_none(function, as_given, graphs):
    compiled = Inductor(function)
    for limit in (1.0, 2.0, 3.0, 0.5, 7.25, 100.0):
        params = parameters(torch.full((3,), 90.0), torch.full((4,), 10.0))
        expected = copies(params)
        compiled(params, as_given(limit))
        function(expected, limit)
        assert_equal(tuple(grads_of(params)), tuple(grads_of(expected)))
    assert compiled.graphs == graphs


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("function", [fastguard.clip_grad_norm_, fastguard.clip_grad_value_])
def test_limits_may_be_numpy_numbers(function, kind):
    compiled = Inductor(lambda ps, x: function(ps, x))
    for limit in (1, 2, 3):
        params = parameters(torch.full((3,), 90.0), torch.full((4,), 10.0))
        expected = copies(params)
        compiled(params, kind(limit))
        function(expected, limit)
        assert_equal(tuple(grads_of(params)), tuple(grads_of(expected)))
    assert compiled.graphs <= 2


@pytest.mark.parametrize(
    ("as_given", "graphs"), [(float, 2), (torch.tensor, 1), (np.float32, 1), (np.float64, 2)]
)
def test_changing_fill_values_cause_one_recompilation_and_tensors_none(as_given, graphs):
    compiled = Inductor(lambda ps, x, y: fastguard.sanitize_grads_(ps, nan=x, neginf=y).counts)
    for fill in (1.0, 2.0, 3.0, 0.5, 7.25, 100.0):
        params = parameters(torch.tensor([NAN, 1.0]), torch.tensor([-INF]))
        given = as_given(fill), as_given(-fill)
        assert compiled(params, *given).tolist() == [[1, 0], [0, 0], [0, 1]]
        assert [g.tolist() for g in grads_of(params)] == [[fill, 1.0], [-fill]]
    assert compiled.graphs == graphs
    if as_given is torch.tensor:
        with pytest.raises(ValueError, match="nan=nan must be a finite number"):
            compiled(parameters(torch.ones(2), torch.ones(1)), torch.tensor(NAN), torch.tensor(1.0))


def test_changing_gradients_cause_no_recompilation_and_a_new_pattern_of_none_causes_one():
    compiled = Inductor(lambda ps: fastguard.clip_grad_norm_(ps, 1.0))
    params = parameters(torch.ones(3), torch.ones(4))
    for grads in (
        (torch.randn(3), torch.randn(4)),
        (torch.zeros(3), torch.full((4,), NAN)),
        (torch.full((3,), 1e20), torch.randn(4)),
    ):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        compiled(params)
    assert compiled.graphs == 1
    params[0].grad = None
    params[1].grad = torch.full((4,), 8.0)
    assert compiled(params) == 16.0
    assert compiled.graphs == 2
    params[0].grad = torch.ones(3)
    compiled(params)
    assert compiled.graphs == 2


def train_step(model: nn.Module, x: Tensor) -> Tensor:
    return fastguard.clip_grad_norm_(model.parameters(), 0.1)


def test_one_graph_over_many_steps_with_gradients_that_are_sometimes_none():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    compiled = Inductor(train_step)
    for _ in range(5):
        model(torch.randn(6, 4)).square().mean().backward()
        expected = fastguard.get_total_norm([p.grad for p in model.parameters()])
        assert compiled(model, torch.randn(6, 4)) == expected
        left = fastguard.get_total_norm([p.grad for p in model.parameters()])
        assert left <= 0.1
        model.zero_grad(set_to_none=True)
    assert compiled.graphs == 1


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_"])
def test_generated_code_holds_no_copy_of_a_gradient(name):
    n = 12_347  # a size that occurs nowhere else in the code
    params = parameters(torch.ones(n), torch.ones(n, 2))
    _, (code,) = run_and_get_code(torch.compile(FUNCTIONS[name], fullgraph=True), params)
    assert "torch.ops.fastguard." in code
    body = code[code.index("def call(") :]
    assert not re.search(r"clone|\bcopy_\(", body)
    allocated = [line for line in body.splitlines() if re.search(r"empty\w*\(", line)]
    assert not [line for line in allocated if str(n) in line]
    for p in params:
        assert p.grad.max() < 1.0


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace backward",
)
def test_backward_inside_the_compiled_function():
    def step(model, x):
        model(x).square().mean().backward()
        return fastguard.clip_grad_norm_(model.parameters(), 0.1)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        eager, compiled = nn.Linear(3, 1), nn.Linear(3, 1)
        compiled.load_state_dict(eager.state_dict())
        x = torch.randn(5, 3)
        norm = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, x)
        torch.testing.assert_close(norm, step(eager, x))
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_eager_code_does_not_use_the_dispatcher(monkeypatch):
    def dispatched(*args):
        raise AssertionError("an op was dispatched in eager mode")

    for op in torch._C._dispatch_get_all_op_names():
        if op.startswith("fastguard::"):
            monkeypatch.setattr(torch.ops.fastguard, op.removeprefix("fastguard::"), dispatched)
    for function in FUNCTIONS.values():
        function(parameters(torch.tensor([3.0, 0.0]), torch.tensor([[0.0, -4.0]])))
