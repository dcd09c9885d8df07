"""`clip_grad_adaptive_` compared with a float64 reference: dtypes, layouts, NaN, exclusions."""

import math
import random

import numpy as np
import pytest
import torch

import fastguard
from fastguard import NonFiniteGradError, clip_grad_adaptive_
from guardtest import long_tests
from guardtest.agc import assert_clipped, expected, parameters

NAN, INF = math.nan, math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def clipped(ps, **options):
    """Returns the clipped gradients of the function and of the reference."""
    known = {k: options[k] for k in ("clip_factor", "eps") if k in options}
    wanted = [expected(p.grad, p, p=options.get("norm_type", 2.0), **known) for p in ps]
    clip_grad_adaptive_(ps, **options)
    return [p.grad for p in ps], wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, INF])
def test_every_shape_and_dtype(dtype, norm_type):
    ps = parameters(dtype)
    before = [p.grad.clone() for p in ps]
    grads, wanted = clipped(ps, norm_type=norm_type)
    assert_clipped(grads, wanted)
    changed = [not torch.equal(g, b) for g, b in zip(grads, before, strict=True) if g.numel()]
    assert any(changed) and not all(changed)


def test_many_random_steps():
    for seed in range(20):
        grads, wanted = clipped(parameters(seed=seed, spread=5.0), clip_factor=0.02, eps=0.1)
        assert_clipped(grads, wanted)


PLACES = [  # of a bad element: index of the tensor, index of the element
    *((0, (row, column)) for row in (0, 2, 5) for column in (0, 2, 4)),
    *((1, (i,)) for i in (0, 3, 6)),
    (2, ()),
    (3, (1, 0, 1, 1)),
    *((i, ...) for i in range(4)),  # all elements
]


def test_ten_thousand_steps_with_bad_elements_everywhere():
    n = 10_000 if long_tests() else 500
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.zeros(s)) for s in [(6, 5), (7,), (), (3, 2, 2, 2)]]
    n_clipped = n_bad = 0
    for step in range(n):
        for p in ps:
            rows = (len(p), *[1] * (p.dim() - 1)) if p.dim() > 1 else ()
            p.data.normal_(generator=generator)
            scale = torch.randn(rows, generator=generator).mul(3.0).exp() * 0.01
            p.grad = torch.randn(p.shape, generator=generator) * scale
        if step < 3 * len(PLACES) or chance.random() < 0.1:
            i, at = PLACES[step % len(PLACES)]
            ps[i].grad[at] = (NAN, INF, -INF)[step // len(PLACES) % 3]
            n_bad += 1
        before = [p.grad.clone() for p in ps]
        grads, wanted = clipped(ps)
        assert_clipped(grads, wanted)
        n_clipped += any(not torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    assert n_bad > n / 20 and n_clipped > n / 2


def test_units_below_their_limit_keep_every_bit():
    w = torch.nn.Parameter(torch.ones(4, 9))
    w.grad = torch.full((4, 9), 0.01 * (1 - 1e-6))
    w.grad[2] = 1.0
    before = w.grad.clone()
    clip_grad_adaptive_(w)
    assert torch.equal(w.grad[[0, 1, 3]], before[[0, 1, 3]])
    torch.testing.assert_close(w.grad[2], torch.full((9,), 0.01))


def test_zero_weights_and_zero_gradients():
    w = torch.nn.Parameter(torch.zeros(3, 4))
    w.grad = torch.tensor([[0.0] * 4, [5e-6] * 4, [1.0] * 4])
    clip_grad_adaptive_([w])
    np.testing.assert_allclose(w.grad, [[0.0] * 4, [5e-6] * 4, [5e-6] * 4], rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-25, 1e-10, 1e10, 1e30, 3e38])
@pytest.mark.parametrize("of", ["gradient", "weight"])
def test_squares_beyond_float32(of, magnitude):
    ps = parameters()
    for p in ps:
        if of == "gradient":
            p.grad.clamp_(-1, 1).mul_(magnitude)
        else:
            p.data.clamp_(-1, 1).mul_(magnitude)
    assert_clipped(*clipped(ps))


def test_limits_so_small_that_squares_underflow():
    p = torch.nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[3e-25, 0.0, 4e-25], [1e-30, 0.0, 0.0]])
    assert_clipped(*clipped([p], clip_factor=1e-5, eps=1e-20))
    assert p.grad[0].norm(dtype=torch.float64).item() == pytest.approx(1e-25)


def in_layout(shape, layout):
    x = torch.randn(shape)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]  # with gaps


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "holes"])
@pytest.mark.parametrize("of", ["both", "gradient", "weight"])
def test_layouts(of, layout):
    shape = (6, 5, 4, 3)
    weight = in_layout(shape, layout) if of != "gradient" else torch.randn(shape)
    p = torch.nn.Parameter(weight)
    assert p.stride() == weight.stride()
    p.grad = in_layout(shape, layout) if of != "weight" else torch.randn(shape)
    stride = p.grad.stride()
    assert_clipped(*clipped([p]))
    assert p.grad.stride() == stride


def test_elements_between_those_of_a_strided_gradient_are_unchanged():
    whole = torch.ones(4, 6)
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = whole[:, ::2]
    clip_grad_adaptive_([p])
    assert torch.equal(whole[:, 1::2], torch.ones(4, 3))
    torch.testing.assert_close(whole[:, ::2], torch.full((4, 3), 0.01))


def test_units_of_complex_parameters():
    vector = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    matrix = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    vector.grad = torch.tensor([1j, 0, 0], dtype=torch.complex64)
    matrix.grad = torch.tensor([[1j, 0, 0], [0, 1e-3, 0]], dtype=torch.complex64)
    clip_grad_adaptive_([vector, matrix])
    limit = 0.01 * math.sqrt(3)
    torch.testing.assert_close(vector.grad, torch.tensor([limit * 1j, 0, 0]))
    torch.testing.assert_close(matrix.grad, torch.tensor([[limit * 1j, 0, 0], [0, 1e-3, 0]]))
    with pytest.raises(TypeError, match="complex and norm_type is 1"):
        clip_grad_adaptive_([vector], norm_type=1.0)


def test_weights_and_gradients_of_other_dtypes():
    ps = [*parameters(torch.float32), *parameters(torch.bfloat16), *parameters(torch.float64)]
    assert_clipped(*clipped(ps))


def with_bad_units(dtype=torch.float32):
    """Returns a parameter of five units: finite, NaN, Inf, below the limit, -Inf and NaN."""
    p = torch.nn.Parameter(torch.ones(5, 3, dtype=dtype))
    p.grad = torch.ones(5, 3, dtype=dtype)
    p.grad[1, 2] = NAN
    p.grad[2, 0] = INF
    p.grad[3] = 0.001
    p.grad[4, 0], p.grad[4, 1] = -INF, NAN
    return p


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_unit_does_not_affect_others(dtype):
    grads, wanted = clipped([with_bad_units(dtype)])
    assert_clipped(grads, wanted)
    grad = grads[0]
    assert grad[1].isnan().all() and grad[4].isnan().all()
    assert grad[2].tolist()[1:] == [0.0, 0.0] and grad[2, 0].isnan()
    assert grad[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_mode_sets_bad_elements_to_zero_and_clips_the_rest(dtype):
    p = with_bad_units(dtype)
    cleaned = torch.where(p.grad.isfinite(), p.grad, 0.0)
    wanted = expected(cleaned, p)
    clip_grad_adaptive_([p], nonfinite="zero")
    assert_clipped([p.grad], [wanted])


def test_raise_names_the_parameter_and_changes_nothing():
    good, bad = parameters()[3], with_bad_units()
    before = good.grad.clone(), bad.grad.clone()
    with pytest.raises(NonFiniteGradError, match=r"2 NaN, 1 \+Inf, 1 -Inf.* in body.weight"):
        clip_grad_adaptive_([("head", good), ("body.weight", bad)], nonfinite="raise")
    assert torch.equal(good.grad, before[0])
    torch.testing.assert_close(bad.grad, before[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_units_with_non_finite_weights_are_not_clipped(value):
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.data[0, 1] = value
    p.grad = torch.ones(2, 3)
    clip_grad_adaptive_([p])
    torch.testing.assert_close(p.grad, torch.tensor([[1.0] * 3, [0.01] * 3]))


def network():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 2)})
    net.register_parameter("header", torch.nn.Parameter(torch.ones(2)))
    for p in net.parameters():
        p.grad = torch.full_like(p, 10.0)
    return net


@pytest.mark.parametrize("exclude", [["head"], "head", ("head.weight", "head.bias"), ["head.*"]])
def test_names_modules_and_patterns_are_excluded(exclude):
    net = network()
    clip_grad_adaptive_(net.named_parameters(), exclude=exclude)
    kept = {name for name, p in net.named_parameters() if (p.grad == 10.0).all()}
    assert kept == {"head.weight", "head.bias"}


def test_tensors_are_excluded():
    net = network()
    clip_grad_adaptive_(net.parameters(), exclude=net["head"].parameters())
    assert (net["head"].weight.grad == 10.0).all() and net["body"].weight.grad.max() < 1.0


def test_excluded_gradients_are_cleaned_too():
    net = network()
    net["head"].bias.grad[0] = NAN
    clip_grad_adaptive_(net.named_parameters(), exclude=["head"], nonfinite="zero")
    assert net["head"].bias.grad.tolist() == [0.0, 10.0]


@pytest.mark.parametrize(
    ("parameters", "exclude", "text"),
    [
        ("named", ["haed"], "'haed', which matches no parameter; did you mean 'head'"),
        ("plain", ["head"], r"no names; pass model.named_parameters\(\)"),
        ("named", [torch.ones(2)], r"tensor of shape \(2,\), which is not one of the parameters"),
        ("named", [3], "exclude holds 3, a int; pass names"),
    ],
)
def test_an_exclusion_that_matches_nothing_is_refused(parameters, exclude, text):
    net = network()
    given = net.named_parameters() if parameters == "named" else net.parameters()
    with pytest.raises((ValueError, TypeError), match=text):
        clip_grad_adaptive_(given, exclude=exclude)
    assert all((p.grad == 10.0).all() for p in net.parameters())


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, True, "0.01", None])
@pytest.mark.parametrize("name", ["clip_factor", "eps"])
def test_bad_numbers(name, value):
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    with pytest.raises((ValueError, TypeError), match=f"AGC {name}"):
        clip_grad_adaptive_([p], **{name: value})


def test_bad_modes_and_parameters():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    with pytest.raises(ValueError, match="nonfinite='skip' is unknown here"):
        clip_grad_adaptive_([p], nonfinite="skip")
    with pytest.raises(TypeError, match="none of the 1 tensors"):
        clip_grad_adaptive_([torch.ones(1)])


def test_nothing_to_clip():
    clip_grad_adaptive_([])
    clip_grad_adaptive_([torch.nn.Parameter(torch.ones(2))])


def test_gradients_that_require_grad():
    p = torch.nn.Parameter(torch.ones(2, 2))
    (p * p).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    clip_grad_adaptive_([p])
    torch.testing.assert_close(p.grad.detach(), torch.full((2, 2), 0.01))


def test_views_with_a_negative_bit():
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch._neg_view(torch.ones(2, 2))
    clip_grad_adaptive_([p])
    torch.testing.assert_close(p.grad, torch.full((2, 2), -0.01))


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_compiled_in_one_graph(nonfinite):
    eager, compiled = parameters(), parameters()
    for ps in (eager, compiled):
        ps[4].grad[1] = NAN
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(ps, factor):
        clip_grad_adaptive_(ps, factor, nonfinite=nonfinite)

    run = torch.compile(step, backend=backend, fullgraph=True)
    for factor in (0.5, 0.1, 0.03, 0.01):
        step(eager, factor)
        run(compiled, factor)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad) or nonfinite == "propagate"
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)
    assert len(graphs) <= 2  # a changed number causes one recompilation


def test_compiled_code_refuses_bad_limits():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)

    @torch.compile(backend="eager")
    def step(factor):
        clip_grad_adaptive_([p], factor)

    # The "eager" backend runs no_grad as two nodes of the graph; an error between
    # them leaves gradients disabled.
    with torch.enable_grad(), pytest.raises(ValueError, match="AGC clip_factor"):
        step(-1.0)


def test_it_is_public():
    assert "clip_grad_adaptive_" in fastguard.__all__ and "AGC" in fastguard.__all__
