"""Each other feature works with flat parameters, or is refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastguard import GuardedOptimizer
from fastguard.guard.watch.replica_drift import checksum
from guardtest.flat_pairs import CLOSE, in_one_buffer, pair_of
from guardtest.gloo_groups import group_of_one
from guardtest.grads import assert_bitwise_equal


def adamw(parameters, flat=True, **options):
    inner = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    return GuardedOptimizer(inner, max_norm=1.0, flat_parameters=flat, **options)


def both(make):
    """Returns a model with flat parameters and an equal model without, with their guards."""
    twins = []
    for flat in (True, False):
        torch.manual_seed(0)
        model = make()
        twins.append((model, adamw(model.parameters(), flat)))
    return twins


def perceptron():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def backward(model, number, dtype=torch.float32):
    generator = torch.Generator().manual_seed(number)
    model(torch.randn(4, 3, generator=generator).to(dtype)).square().mean().backward()


def train(model, opt, numbers, dtype=torch.float32):
    for number in numbers:
        opt.zero_grad()
        backward(model, number, dtype)
        opt.step()


def assert_close_models(a, b):
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize(
    "make",
    [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.LBFGS, torch.optim.Adafactor],
    ids=lambda cls: cls.__name__,
)
def test_other_optimizers_are_refused_naming_the_supported_ones(make):
    model = perceptron()
    with pytest.raises(TypeError, match=r"does not support .*, only AdamW, Adam, SGD, Adagrad of"):
        GuardedOptimizer(make(model.parameters()), flat_parameters=True)


def test_a_subclass_is_refused_since_its_update_may_differ():
    class Own(torch.optim.AdamW):
        pass

    with pytest.raises(TypeError, match=r"does not support .*\.Own, .*use flat_buckets=True"):
        GuardedOptimizer(Own(perceptron().parameters()), flat_parameters=True)


class Tied(nn.Module):
    """Input and output layer share one Parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_tied_weights_stay_tied():
    (a, opt), (b, plain) = both(Tied)
    for model, guard in ((a, opt), (b, plain)):
        train(model, guard, range(4))
    assert a.first.weight is a.last.weight
    assert_close_models(a, b)


@pytest.mark.parametrize("named", [False, True], ids=["", "frozen"])
def test_two_parameters_in_the_same_memory_are_refused(named):
    model = perceptron()
    model[2].weight = nn.Parameter(model[0].weight.data.view(-1)[:10].view(2, 5))
    before = [p.data_ptr() for p in model.parameters()]
    options = {}
    parameters = list(model.parameters())
    if named:  # the second parameter is not in the optimizer
        parameters = [p for p in parameters if p is not model[2].weight]
        options["named_parameters"] = model.named_parameters()
    with pytest.raises(ValueError, match=r"share memory.*assign the same Parameter"):
        adamw(parameters, **options)
    assert before == [p.data_ptr() for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_do_not_move_until_they_train():
    twins = []
    for flat in (True, False):
        torch.manual_seed(0)
        model = perceptron()
        model[0].weight.requires_grad_(False)
        address = model[0].weight.data_ptr()
        guard = adamw(model.parameters(), flat)
        train(model, guard, range(2))
        assert model[0].weight.data_ptr() == address
        model[0].weight.requires_grad_(True)
        train(model, guard, range(2, 4))
        model[2].bias.requires_grad_(False)
        kept = model[2].bias.detach().clone()
        train(model, guard, range(4, 6))
        assert_bitwise_equal(model[2].bias.detach(), kept)
        twins.append(model)
    assert_close_models(*twins)
    assert in_one_buffer(list(twins[0].parameters()))


def test_a_param_group_that_is_added_later():
    (a, opt), (b, plain) = both(perceptron)
    for model, guard in ((a, opt), (b, plain)):
        train(model, guard, range(2))
        torch.manual_seed(1)
        model.append(nn.Linear(2, 2))
        guard.add_param_group({"params": list(model[3].parameters()), "lr": 0.01})
        train(model, guard, range(2, 5))
    assert_close_models(a, b)
    assert [float(opt.state[p]["step"]) for p in a.parameters()] == [5.0] * 4 + [3.0] * 2
    one, two = (g["params"] for g in opt.param_groups)
    assert in_one_buffer(one) and in_one_buffer(two) and not in_one_buffer([one[0], two[0]])
    aliased = nn.Parameter(a[0].weight.data)
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [aliased]})
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_a_grad_scaler(unscale):
    (a, opt), (b, plain) = both(perceptron)
    for model, guard in ((a, opt), (b, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for number in range(6):
            guard.zero_grad()
            generator = torch.Generator().manual_seed(number)
            loss = model(torch.randn(4, 3, generator=generator)).square().mean()
            scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
            if unscale:
                scaler.unscale_(guard)
            scaler.step(guard)
            scaler.update()
        assert guard.skipped_steps == 1 and guard.applied_steps == 5
    assert_close_models(a, b)


def test_accumulation():
    (a, opt), (b, plain) = both(perceptron)
    for model, guard in ((a, opt), (b, plain)):
        for number in range(6):
            backward(model, number)
            if number % 2:
                guard.step()
                guard.zero_grad()
    assert_close_models(a, b)


@pytest.mark.parametrize("after", [0, 2], ids=["fresh", "trained"])
def test_a_deepcopy_trains_independently(after):
    model, opt = both(perceptron)[0]
    train(model, opt, range(after))
    twin_model, twin = copy.deepcopy((model, opt))
    before = [p.detach().clone() for p in model.parameters()]
    train(twin_model, twin, range(after, after + 3))
    for p, old in zip(model.parameters(), before, strict=True):
        assert_bitwise_equal(p.detach(), old)
    train(model, opt, range(after, after + 3))
    assert_close_models(model, twin_model)
    assert in_one_buffer(list(twin_model.parameters()))
    assert not in_one_buffer([next(model.parameters()), next(twin_model.parameters())])


def test_averaged_copies_do_not_change_with_the_model():
    twins = []
    for model, opt in both(perceptron):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for number in range(4):
            train(model, opt, [number])
            ema.update_parameters(model)
        twins.append(ema.module)
    assert_close_models(*twins)
    assert not in_one_buffer(list(twins[0].parameters()))


def test_weights_swapped_by_hand_are_detected_and_both_copies_kept():
    (a, opt), (b, plain) = both(perceptron)
    for model, guard in ((a, opt), (b, plain)):
        train(model, guard, range(2))
        others = [torch.full_like(p, 0.25) for p in model.parameters()]
        kept = []
        for p, other in zip(model.parameters(), others, strict=True):
            kept.append(p.data)
            p.data = other
        values = [k.clone() for k in kept]
        train(model, guard, range(2, 4))
        for k, v in zip(kept, values, strict=True):
            assert_bitwise_equal(k, v)
        for p, k in zip(model.parameters(), kept, strict=True):
            p.data = k
        train(model, guard, range(4, 6))
    assert_close_models(a, b)
    assert in_one_buffer(list(a.parameters()))


def test_a_model_in_another_dtype():
    model, opt = both(perceptron)[0]
    train(model, opt, range(2))
    reference = copy.deepcopy(model).double()
    inner = torch.optim.AdamW(reference.parameters(), lr=0.1, fused=True)
    inner.load_state_dict(opt.optimizer.state_dict())
    plain = GuardedOptimizer(inner, max_norm=1.0)
    model.double()
    train(model, opt, range(2, 4), torch.float64)
    train(reference, plain, range(2, 4), torch.float64)
    assert_close_models(model, reference)
    assert all(s["exp_avg"].dtype is torch.float64 for s in opt.state.values())


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = perceptron()
    with pytest.raises(ValueError, match=r"on device meta.*move the model before"):
        adamw(model.parameters())


def test_memory_shared_with_other_processes_is_refused():
    model = perceptron()
    model.share_memory()
    with pytest.raises(ValueError, match="shared between processes"):
        adamw(model.parameters())


def test_dtensors_are_refused_since_they_are_already_flat():
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        with pytest.raises(TypeError, match="which is already flat"):
            adamw([p])


def test_a_tensor_subclass_is_refused():
    class Own(nn.Parameter):
        pass

    with pytest.raises(TypeError, match="is a Own, but flat_parameters=True supports only plain"):
        adamw([Own(torch.ones(3))])


def test_channels_last_weights_keep_their_strides():
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)

    (a, opt), (b, plain) = both(make)
    for model, guard in ((a, opt), (b, plain)):
        for number in range(3):
            guard.zero_grad()
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(2, 3, 5, 5, generator=generator)).square().mean().backward()
            guard.step()
    assert a[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close_models(a, b)


def test_lazy_modules_are_included_once_they_have_a_shape():
    (a, opt), (b, plain) = both(lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1)))
    for model, guard in ((a, opt), (b, plain)):
        torch.manual_seed(2)
        train(model, guard, range(3))
    assert_close_models(a, b)
    assert in_one_buffer(list(a.parameters()))


def test_a_scheduler_of_the_wrapped_optimizer_counts_its_steps(recwarn):
    pair = pair_of("adamw")
    schedulers = [
        torch.optim.lr_scheduler.StepLR(opt, 2, 0.1) for opt in (pair.opt.optimizer, pair.plain)
    ]
    for number in range(5):
        pair.step(number)
        for scheduler in schedulers:
            scheduler.step()
    pair.assert_same()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_closure():
    pair = pair_of("adamw")
    calls = []

    def closure():
        calls.append(1)
        loss = sum(p.square().sum() for p in pair.ours)
        pair.opt.zero_grad()
        loss.backward()
        return loss

    loss = pair.opt.step(closure)
    assert len(calls) == 1 and loss.item() > 0 and pair.opt.applied_steps == 1


def test_checksums_read_all_weights_in_few_tensors():
    model = perceptron()
    model[2].bias.requires_grad_(False)
    opt = adamw(model.parameters())
    weights = opt._stepper.weights()
    assert len(weights) == 2  # the block, and the frozen bias
    device = weights[0].device
    expected = checksum([p.detach().clone() for p in model.parameters()], device)
    assert checksum(weights, device) == expected
    model[0].weight.data = model[0].weight.data + 1.0  # in other memory, so the block is outdated
    assert opt._stepper.weights() is None
    backward(model, 0)
    opt.step()
    now = checksum([p.detach().clone() for p in model.parameters()], device)
    assert checksum(opt._stepper.weights(), device) == now != expected
