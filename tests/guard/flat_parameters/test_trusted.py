"""With `"trusted"` flat parameters or buckets, a step checks only some of the tensors."""

import copy

import pytest
import torch
from torch import nn

from fastguard import GuardedOptimizer
from fastguard.functional.flat_layout import SMALLEST_SHARE, TURNS, share_of
from guardtest.flat_pairs import CLOSE, in_one_buffer
from guardtest.grads import assert_bitwise_equal

KINDS = ("flat_buckets", "flat_parameters")


def perceptron(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def guard(model, kind, value="trusted", **options):
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    options |= {} if kind is None else {kind: value}
    named = model.named_parameters()
    return GuardedOptimizer(inner, max_norm=1.0, named_parameters=named, **options)


def backward(model, number):
    generator = torch.Generator().manual_seed(number)
    loss = model(torch.randn(4, 3, generator=generator)).square().mean()
    if number == 2:
        loss = loss * float("nan")
    loss.backward()


def train(model, opt, numbers):
    for number in numbers:
        opt.zero_grad()
        backward(model, number)
        opt.step()


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000, 5000])
def test_all_tensors_are_checked_in_64_steps(n):
    seen = [i for turn in range(5, 5 + TURNS) for i in range(n)[share_of(n, turn)]]
    assert set(seen) == set(range(n))
    assert max(len(range(n)[share_of(n, turn)]) for turn in range(TURNS)) <= max(
        SMALLEST_SHARE, n / 60
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_training_without_trusted(kind):
    models = [perceptron() for _ in range(3)]
    guards = [guard(models[0], kind), guard(models[1], kind, True), guard(models[2], None)]
    for model, opt in zip(models, guards, strict=True):
        train(model, opt, range(6))
    assert [opt.skipped_steps for opt in guards] == [1, 1, 1]
    for p, q, r in zip(*(model.parameters() for model in models), strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
        torch.testing.assert_close(p, r, **CLOSE)


def replace_grad(model):
    model[2].bias.grad = torch.ones(2)


def remove_grads(model):
    model.zero_grad()
    backward(model, 1)


def swap_memory_of_grad(model):
    model[2].bias.grad.data = torch.ones(2)


def freeze(model):
    model[2].bias.requires_grad_(False)


BROKEN = (replace_grad, remove_grads, swap_memory_of_grad, freeze)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", BROKEN, ids=lambda f: f.__name__)
def test_a_replaced_tensor_is_an_error_and_nothing_is_changed(kind, change):
    model = perceptron()
    opt = guard(model, kind)
    train(model, opt, range(2))
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=rf"\.(weight|bias) or its .*{kind}='trusted' does not"):
        opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert_bitwise_equal(p.detach(), old)
    assert opt.steps_taken == 2


def test_a_parameter_with_replaced_memory_is_an_error():
    model = perceptron()
    opt = guard(model, "flat_parameters")
    train(model, opt, range(2))
    model[2].bias.data = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"2\.bias or its gradient was replaced"):
        opt.step()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfrozen_parameter_is_an_error(kind):
    model = perceptron()
    model[0].weight.requires_grad_(False)
    opt = guard(model, kind)
    train(model, opt, range(2))
    model[0].weight.requires_grad_(True)
    backward(model, 3)
    with pytest.raises(RuntimeError, match=r"0\.weight or its gradient was replaced.* or unfrozen"):
        opt.step()


def test_one_replaced_gradient_among_thousands_is_found_within_64_steps():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3000)]
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1), flat_parameters="trusted")
    opt.step()
    parameters[2222].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="parameter 2222 or its gradient"):
        for _ in range(TURNS):
            opt.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_param_group_added_later(kind):
    models = [perceptron() for _ in range(2)]
    guards = [guard(models[0], kind), guard(models[1], kind, True)]
    for model, opt in zip(models, guards, strict=True):
        train(model, opt, range(2))
        model.append(nn.Linear(2, 2, bias=False))
        nn.init.ones_(model[3].weight)
        opt.add_param_group({"params": list(model[3].parameters()), "lr": 0.01})
        train(model, opt, range(3, 6))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def test_copies_and_state_dicts():
    model = perceptron()
    opt = guard(model, "flat_parameters")
    train(model, opt, range(4))
    twin, guard_of_twin = copy.deepcopy((model, opt))
    third = perceptron()
    third.load_state_dict(model.state_dict())
    resumed = guard(third, "flat_parameters")
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, its in ((model, opt), (twin, guard_of_twin), (third, resumed)):
        train(one, its, range(4, 7))
        assert in_one_buffer(list(one.parameters()))
    for p, q, r in zip(model.parameters(), twin.parameters(), third.parameters(), strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
        assert_bitwise_equal(p.detach(), r.detach())


@pytest.mark.parametrize("value", [True, "trusted"])
def test_a_graph_from_before_the_step_is_invalid(value):
    """Autograd detects this by version counters, which flat updates must increment."""
    model = perceptron()
    opt = guard(model, "flat_parameters", value)
    train(model, opt, range(2))
    loss = model(torch.ones(4, 3)).square().mean()
    versions = [p._version for p in model.parameters()]
    opt.step()
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_version_counter_is_incremented_unless_trusted():
    for value, n_moved in ((True, 1000), ("trusted", SMALLEST_SHARE)):
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(1000)]
        opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1), flat_parameters=value)
        opt.step()
        before = [p._version for p in parameters]
        opt.step()
        moved = [p._version > v for p, v in zip(parameters, before, strict=True)]
        assert sum(moved) == n_moved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["Trusted", None, 2])
def test_other_values_are_refused(kind, value):
    with pytest.raises(ValueError, match=rf"{kind}=.* is unknown; use True, False or 'trusted'"):
        guard(perceptron(), kind, value)


def test_an_edited_parameter_list_is_detected():
    """Comparing lists with `==` is not enough, because different tensors may be equal."""
    old, new = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([old], lr=1.0)
    opt = GuardedOptimizer(inner, flat_buckets=True)
    old.grad.fill_(1.0)
    opt.step()
    inner.param_groups[0]["params"][0] = new
    new.grad = torch.ones(1)
    opt.step()
    assert (old.item(), new.item()) == (0.0, -1.0)
