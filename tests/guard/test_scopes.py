"""Clip scopes, limits of param groups, clip values, and gradients of any dtype."""

import math

import pytest
import torch

from guardtest.guarded import one, sgd
from guardtest.tolerances import NORM_RTOL
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison, snapshot

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_scopes_equal_torch_on_each_part(scope, norm_type, flat):
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


def test_a_param_group_may_have_its_own_limit():
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


def test_clip_value_clamps_before_the_norm_and_does_not_hide_nan():
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


def a_complex_parameter():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.ones(2, dtype=torch.complex64)
    return p


def test_clip_value_is_refused_for_complex_parameters():
    complex_one = {"params": [a_complex_parameter()], "clip_value": 0.5}
    message = r"clip_value=0.5 and a complex parameter of shape \(2,\).*use max_norm"
    with pytest.raises(TypeError, match=message):
        sgd([complex_one])
    opt = sgd(new_parameters())
    with pytest.raises(TypeError, match=message):
        opt.add_param_group(complex_one)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_clip_value_set_later_clamps_all_groups_or_none(nonfinite):
    real = torch.nn.Parameter(torch.zeros(2))
    real.grad = torch.tensor([3.0, -4.0])
    groups = [{"params": [real], "clip_value": 0.5}, {"params": [a_complex_parameter()]}]
    opt = sgd(groups, nonfinite=nonfinite)
    opt.param_groups[1]["clip_value"] = 0.5
    before = snapshot(opt)
    with pytest.raises(TypeError, match=r"gradient is complex.*use"):
        opt.step()
    assert real.grad.tolist() == [3.0, -4.0]
    assert_same_bits(snapshot(opt), before)
    assert opt.applied_steps == 0


def test_clip_value_beyond_the_range_of_a_dtype_has_no_effect_on_it():
    a = torch.nn.Parameter(torch.zeros(2))
    b = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    opt = sgd([{"params": [a, b], "clip_value": 1e6}])
    a.grad, b.grad = torch.tensor([2e6, -3.0]), torch.tensor([6e4, -3.0]).half()
    opt.step()
    assert (-a).tolist() == [1e6, -3.0]
    assert (-b).tolist() == [6e4, -3.0]
    b.grad = torch.tensor([6e4, INF]).half()
    opt.step()
    assert opt.records()[1].posinf == 1


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
