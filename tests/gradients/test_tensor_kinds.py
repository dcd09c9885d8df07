"""Gradients that are not plain tensors: placeholders, and subclasses that wrap other tensors. The
functions work where torch's functions do, give the results of plain tensors, and do not keep such
tensors in a cache.
"""

import subprocess
import sys

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fastguard
from fastguard.errors.versions import SHARDED_ESTIMATES
from fastguard.gradients.tensor_kinds import Kind, kind_of, lasting, watched
from guardtest.programs import run_program
from guardtest.versions import needs

INF = float("inf")
FEW, MANY = 3, 40  # numbers of tensors; with MANY, the layout is cached


def some_grads(n=FEW, device="cpu"):
    return [torch.full((4,), 10.0 * (i + 1), device=device) for i in range(n)]


def parameters(grads):
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


FUNCTIONS = {
    "clip_grad_norm_": lambda gs: fastguard.clip_grad_norm_(parameters(gs), 2.0),
    "inf-norm": lambda gs: fastguard.clip_grad_norm_(parameters(gs), 2.0, INF),
    "p=3": lambda gs: fastguard.clip_grad_norm_(parameters(gs), 2.0, 3.0),
    "max inf": lambda gs: fastguard.clip_grad_norm_(parameters(gs), INF),
    "zero": lambda gs: fastguard.clip_grad_norm_(parameters(gs), 2.0, nonfinite="zero"),
    "get_total_norm": lambda gs: fastguard.get_total_norm(gs),
    "clip_grads_with_norm_": lambda gs: fastguard.clip_grads_with_norm_(
        parameters(gs), 2.0, fastguard.get_total_norm(gs)
    ),
    "clip_grad_value_": lambda gs: fastguard.clip_grad_value_(parameters(gs), 15.0),
    "clip_grad_adaptive_": lambda gs: fastguard.clip_grad_adaptive_(parameters(gs)),
    "clip_grad_adaptive_ zero": lambda gs: fastguard.clip_grad_adaptive_(
        parameters(gs), nonfinite="zero"
    ),
    "sanitize_grads_": lambda gs: fastguard.sanitize_grads_(parameters(gs)).total_norm,
    "sanitize_grads_ 1": lambda gs: fastguard.sanitize_grads_(parameters(gs), nan=1.0).total_norm,
    "measure_grads": lambda gs: fastguard.measure_grads(parameters(gs)).nan_count,
    "measure_grads each": lambda gs: (
        fastguard.measure_grads(parameters(gs), per_tensor=True).segment_norms
    ),
}
RAISING = {
    "error_if_nonfinite": lambda gs: fastguard.clip_grad_norm_(
        parameters(gs), 2.0, error_if_nonfinite=True
    ),
    "raise": lambda gs: fastguard.clip_grad_norm_(parameters(gs), 2.0, nonfinite="raise"),
    "adaptive raise": lambda gs: fastguard.clip_grad_adaptive_(parameters(gs), nonfinite="raise"),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_function_and_raise = pytest.mark.parametrize("name", {**FUNCTIONS, **RAISING})


def function_of(name):
    return {**FUNCTIONS, **RAISING}[name]


@pytest.fixture(autouse=True)
def plain_calls_work_afterwards():
    """Checks after each test that cached tensors are plain."""
    yield
    assert not watched()
    for n in (FEW, MANY):
        grads = some_grads(n)
        norm = fastguard.clip_grad_norm_(parameters(grads), 2.0)
        assert type(norm) is Tensor
        assert norm.item() == pytest.approx(20 * sum((i + 1) ** 2 for i in range(n)) ** 0.5)
        assert fastguard.get_total_norm(grads).item() == pytest.approx(2.0)
        assert fastguard.measure_grads(parameters(grads)).culprits() == []


def outcome(function, grads):
    """Returns the result and the changed gradients of a function that can be traced."""
    result = function(grads)
    return (grads[0].sum() if result is None else result), *grads


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# Placeholders.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("n", [FEW, MANY])
@every_function_and_raise
def test_fake_tensor_mode_with_devices_that_this_machine_lacks(name, n, device):
    function, plain = function_of(name), function_of(name)(some_grads(n))
    with FakeTensorMode():
        got = function(some_grads(n, device))
    if plain is not None:
        assert isinstance(got, FakeTensor)
        assert (got.shape, got.dtype, got.device.type) == (plain.shape, plain.dtype, device)


@every_function_and_raise
def test_placeholders_outside_of_their_mode(name):
    with FakeTensorMode():
        grads = some_grads()
    got = function_of(name)(grads)
    assert got is None or isinstance(got, FakeTensor)


def test_placeholders_of_several_devices_and_dtypes():
    with FakeTensorMode():
        grads = [*some_grads(), *some_grads(2, "cuda"), torch.ones(3, dtype=torch.bfloat16)]
        norm = fastguard.clip_grad_norm_(parameters(grads), 1.0)
        stats = fastguard.measure_grads(parameters(grads), per_tensor=True, norm_type=INF)
    assert (norm.device.type, norm.dtype, norm.shape) == ("cpu", torch.float32, ())
    assert stats.segment_norms.shape == (6,) and stats.nan_count.shape == (6,)


def test_memory_estimates_see_no_copy_of_a_gradient():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    self.n = max(self.n, t.numel())
            return out

    with FakeTensorMode():
        params = parameters([torch.ones(1000, 1000) for _ in range(4)])
        with Largest() as seen:
            fastguard.clip_grad_norm_(params, 1.0, nonfinite="zero")
            fastguard.measure_grads(params)
    assert 0 < seen.n <= 16


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@every_function
def test_a_graph_recorded_by_make_fx_works_for_other_gradients(name, mode):
    function = function_of(name)
    graph = make_fx(lambda *gs: outcome(function, list(gs)), tracing_mode=mode)(*some_grads())
    others = [torch.tensor([3.0, -40.0, 5.0, 6.0]), torch.ones(4), torch.full((4,), 7.0)]
    expected = outcome(function, [g.clone() for g in others])
    assert_close(graph(*others), expected)


@pytest.mark.parametrize("name", RAISING)
def test_a_recorded_graph_raises_when_it_runs(name):
    graph = make_fx(lambda *gs: outcome(function_of(name), list(gs)))(*some_grads())
    graph(*some_grads())
    bad = [*some_grads(2), torch.tensor([1.0, float("nan"), 2.0, 3.0])]
    with pytest.raises(fastguard.NonFiniteGradError, match=r"parameter 2 \(1 NaN\)"):
        graph(*bad)


@every_function
def test_ahead_of_time_autograd(name):
    def function(*grads):
        return outcome(function_of(name), [g * 1.0 for g in grads])

    assert_close(aot_function(function, fw_compiler=nop)(*some_grads()), function(*some_grads()))


@every_function
def test_export_without_dynamo(name):
    class Module(nn.Module):
        def forward(self, a, b):
            return outcome(function_of(name), [a * 1.0, b * 1.0])

    exported = torch.export.export(Module(), tuple(some_grads(2)), strict=False).module()
    assert_close(exported(*some_grads(2)), Module()(*some_grads(2)))


# Subclasses that wrap other tensors.


@every_function
def test_per_sample_gradients_inside_vmap(name):
    samples = torch.arange(12.0).reshape(3, 4)

    def function(x):
        return outcome(function_of(name), [x * 1.0, x * 20.0])

    each = [function(x) for x in samples]
    assert_close(
        torch.vmap(function)(samples), [torch.stack(parts) for parts in zip(*each, strict=True)]
    )


@every_function_and_raise
def test_inside_a_transform_by_grad(name):
    def loss(x):
        _, *grads = outcome(function_of(name), [x * 1.0, x * 20.0])
        return sum(g.sum() for g in grads)

    x = torch.ones(4)
    assert torch.func.grad(loss)(x).shape == (4,)
    with torch.no_grad():
        assert_close([torch.func.grad_and_value(loss)(x)[1]], [loss(x)])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@every_function_and_raise
def test_inside_functionalize_and_jit_trace(name):
    def function(a, b):
        return outcome(function_of(name), [a * 1.0, b * 1.0])

    assert_close(torch.func.functionalize(function)(*some_grads(2)), function(*some_grads(2)))
    if name in FUNCTIONS:
        traced = torch.jit.trace(function, tuple(some_grads(2)), check_trace=False)
        others = torch.full((4,), 50.0), torch.arange(4.0)
        assert_close(traced(*others), function(*others))


@every_function_and_raise
def test_a_wrapper_subclass_is_split_into_its_inner_tensors(name):
    function = function_of(name)
    grads = [TwoTensor(g.clone(), g * 3) for g in some_grads()]
    got = function(grads)
    for part, factor in (("a", 1), ("b", 3)):
        plain = [g * factor for g in some_grads()]
        expected = function(plain)
        assert_close([getattr(g, part) for g in grads], plain)
        if expected is not None:
            torch.testing.assert_close(getattr(got, part), expected)


def test_a_wrapper_subclass_raises_in_raise_mode():
    grads = [TwoTensor(g * float("nan"), g * float("nan")) for g in some_grads()]
    with pytest.raises(fastguard.NonFiniteGradError, match=r"^The total norm of order 2\.0"):
        RAISING["error_if_nonfinite"](grads)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize(
    "name", ["get_total_norm", "clip_grad_norm_", "clip_grads_with_norm_", "sanitize_grads_"]
)
def test_a_class_that_lacks_an_operation_is_named(name):
    grads = [torch.masked.masked_tensor(g, g > 15.0) for g in some_grads()]
    function = {
        "get_total_norm": lambda ps: fastguard.get_total_norm([p.grad for p in ps]),
        "clip_grad_norm_": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, INF),
        "clip_grads_with_norm_": lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, 5.0),
        "sanitize_grads_": fastguard.sanitize_grads_,
    }[name]
    params = [nn.Parameter(torch.zeros(4)) for _ in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    said = r"gradients of type MaskedTensor lack .* to_tensor\(0\.0\)"
    with pytest.raises(TypeError, match=said):
        function(params)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to_tensor(0.0)
    function(params)


def test_local_tensors_of_simulated_ranks():
    local = pytest.importorskip("torch.distributed._local_tensor")
    for n in (FEW, MANY):
        grads = [local.LocalTensor({0: g.clone(), 1: g * 3}) for g in some_grads(n)]
        with local.LocalTensorMode(2):
            norm = fastguard.clip_grad_norm_(parameters(grads), 2.0)
            plain = some_grads(n)  # the same gradients on all ranks
            fastguard.clip_grad_norm_(parameters(plain), 2.0)
        left = [local.LocalTensor._local_tensors.__get__(g) for g in (norm, *grads)]
        expected = fastguard.get_total_norm(some_grads(n)).item()
        assert [left[0][r].item() for r in (0, 1)] == pytest.approx([expected, 3 * expected])
        for rank in (0, 1):
            total = fastguard.get_total_norm([g[rank] for g in left[1:]])
            assert total.item() == pytest.approx(2.0)


def test_a_subclass_without_dispatch_is_plain():
    class Named(Tensor):
        pass

    grads = [g.as_subclass(Named) for g in some_grads(MANY)]
    fastguard.clip_grad_norm_(parameters(grads), 2.0)
    assert fastguard.get_total_norm(grads).item() == pytest.approx(2.0)
    assert kind_of({Named, nn.Parameter, Tensor}) is Kind.PLAIN


# Caches.


@pytest.mark.parametrize("limit", [101.0, 102.0])
def test_a_first_call_in_any_mode_leaves_no_tensors_in_caches(limit):
    """Uses new limits, so that their tensors are cached inside the mode."""
    from torch.utils.flop_counter import FlopCounterMode

    def first(grads):
        fastguard.clip_grad_norm_(parameters(grads), limit)
        fastguard.clip_grads_with_norm_(parameters(grads), limit + 0.5, torch.tensor(5.0))

    if limit == 101.0:
        with FakeTensorMode():
            first(some_grads())
    else:
        with FlopCounterMode(display=False), torch.inference_mode():
            first(some_grads(MANY))
    first(some_grads())


def test_cached_tensors_are_plain_under_any_mode():
    with FakeTensorMode(), torch.inference_mode(), lasting():
        made = torch.ones(2)
    assert type(made) is Tensor and made.tolist() == [1, 1] and not made.is_inference()


def test_a_first_import_under_fake_tensor_mode_leaves_plain_constants():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
def clip(fastguard, dtype, optimizer):
    ps = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for _ in range(4)]
    opt = fastguard.GuardedOptimizer(optimizer(ps, lr=0.1), max_norm=1.0)
    for _ in range(2):
        for p in ps:
            p.grad = torch.ones(4, dtype=dtype)
        norm = fastguard.clip_grad_norm_(ps, 1.5)
        opt.step()
    return norm, opt
def each(fastguard):
    for dtype in (torch.float32, torch.bfloat16):
        for optimizer in (
            torch.optim.SGD,
            torch.optim.AdamW,
            lambda ps, lr: torch.optim.SGD(ps, lr, momentum=0.9, fused=True),
            lambda ps, lr: torch.optim.AdamW(ps, lr, fused=True),
            fastguard.optim.AdamW,
        ):
            yield clip(fastguard, dtype, optimizer)
with FakeTensorMode():
    import fastguard
    assert len(list(each(fastguard))) == 10
for norm, opt in each(fastguard):
    assert norm.item() == 4.0 and abs(opt.records()[1].total_norm - 1.5) < 1e-2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs(SHARDED_ESTIMATES)
def test_estimates_of_sharded_training():
    """DTensors of placeholders on fake ranks, in a separate process with its own group."""
    code = """
import torch, torch.distributed as dist, torch.nn.utils as utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
import fastguard
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
mesh = init_device_mesh("cpu", (4,))
def parameters():
    def sharded(value):
        local = torch.full((2, 4), value)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    params = [torch.nn.Parameter(sharded(0.0)) for _ in range(3)]
    for p in params:
        p.grad = sharded(1.0)
    return params
with FakeTensorMode():
    for norm_type in (2.0, float("inf"), 8.0):
        norm = fastguard.clip_grad_norm_(parameters(), 1.0, norm_type, error_if_nonfinite=True)
        assert isinstance(norm, FakeTensor) and norm.shape == ()
    stats = fastguard.measure_grads(parameters(), per_tensor=True)
    assert stats.segment_norms.shape == (3,)
    with fastguard.patch_torch():
        assert isinstance(utils.clip_grad_norm_(parameters(), 1.0), DTensor)
    for options in ({"fused": True}, {"foreach": True}):
        opt = fastguard.GuardedOptimizer(
            torch.optim.AdamW(parameters(), **options), max_norm=1.0
        )
        opt.step()
        assert len(opt.state) == 3 and opt.records() == []
norm = fastguard.clip_grad_norm_(parameters(), 1.0)
assert type(norm) is torch.Tensor and norm.item() > 0
dist.destroy_process_group()
"""
    run_program(code, check=True)
