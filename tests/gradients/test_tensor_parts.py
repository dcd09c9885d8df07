"""Optimizer states in wrapper tensors are copied, saved and loaded like plain ones."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor

from fastguard import CheckpointStore, GuardedOptimizer, Rollback
from fastguard.gradients.tensor_parts import CannotCopy, cloned, parts_of, plain_tensors
from fastguard.recovery.snapshot import Snapshot
from guardtest.guarded import parameters_of
from guardtest.training import give_gradients, new_parameters, poison


class Quantized(Tensor):
    """8-bit codes and one scale; supports the operations of its optimizer, but not `clone`."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, values):
        scale = values.abs().amax().clamp(min=1e-12) / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def values_(self):
        return self.codes.float() * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Quantized takes no {func}")


class Labeled(Tensor):
    """A plain tensor with an attribute."""


def labeled(values, label):
    made = values.as_subclass(Labeled)
    made.label = label
    return made


class Momentum(torch.optim.Optimizer):
    """SGD with a quantized momentum."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in parameters_of(self):
            old = self.state[p].get("momentum")
            values = p.grad + (0.9 * old.values_() if old is not None else 0)
            self.state[p]["momentum"] = Quantized.of(values)
            p -= 0.1 * values


def made():
    return GuardedOptimizer(Momentum(new_parameters()))


def train(opt, steps):
    for step in steps:
        give_gradients(parameters_of(opt), step)
        opt.step()
    return opt


def everything(opt):
    """Returns copies of weights and momenta."""
    momenta = [opt.state[p]["momentum"] for p in parameters_of(opt)]
    assert all(type(m) is Quantized for m in momenta)
    weights = [p.detach().clone() for p in parameters_of(opt)]
    return weights + [t.clone() for m in momenta for t in (m.codes, m.scale)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_rollback_saves_and_restores_wrapper_tensors():
    opt = made()
    weights = torch.nn.ParameterList(parameters_of(opt))
    rollback = Rollback(opt, {"weights": weights}, every=1, after_skips=1)
    for step in range(4):  # each slot is filled twice, the second time into the same buffers
        train(opt, [step])
        rollback.step(step)
    before = everything(opt)
    give_gradients(parameters_of(opt), 9)
    poison(parameters_of(opt))
    opt.step()
    assert rollback.step(4).step == 4
    assert same(everything(opt), before)
    assert same(everything(train(opt, [4])), everything(train(made(), range(5))))


def test_a_snapshot_shares_no_memory_and_names_nonfinite_tensors():
    slot, opt = Snapshot(), train(made(), range(2))
    p = parameters_of(opt)[1]
    slot.take({"optimizer": opt}, 2, None)
    before = everything(opt)
    for tensor in plain_tensors(opt.state[p]["momentum"]):
        tensor.zero_()
    opt.state[p]["momentum"].scale.fill_(float("nan"))
    assert slot.nonfinite() == []
    slot.restore({"optimizer": opt})
    assert same(everything(opt), before)
    opt.state[p]["momentum"].scale.fill_(float("nan"))
    slot.take({"optimizer": opt}, 2, None)
    assert slot.nonfinite() == ["optimizer.state.1.momentum.scale"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_the_guard_works_independently(copied):
    opt = train(made(), range(2))
    twin = copied(opt)
    before = everything(opt)
    train(twin, [2])
    assert same(everything(opt), before)
    assert same(everything(twin), everything(train(opt, [2])))


def test_a_state_dict_resumes_exactly():
    opt, other = train(made(), range(2)), made()
    with torch.no_grad():
        for p, q in zip(parameters_of(other), parameters_of(opt), strict=True):
            p.copy_(q)
    other.load_state_dict(opt.state_dict())
    assert same(everything(train(other, [2])), everything(train(opt, [2])))


def test_a_checkpoint_store_says_which_class_a_later_process_could_not_load(tmp_path):
    opt = train(made(), range(2))
    with pytest.raises(TypeError, match=r"optimizer\.state\.0\.momentum .*add_safe_globals"):
        CheckpointStore(tmp_path / "refused").save({"optimizer": opt}, step=2)
    with torch.serialization.safe_globals([Quantized]):
        store = CheckpointStore(tmp_path / "taken")
        store.save({"optimizer": opt}, step=2)
        before = everything(opt)
        train(opt, [2])
        store.load("last-clean", {"optimizer": opt})
        assert same(everything(opt)[-2:], before[-2:])


def test_nested_subclasses_are_split_completely():
    inner = Quantized.of(torch.randn(3))
    outer = Quantized(torch.zeros(3, dtype=torch.int8), inner)
    assert [type(t) for t in plain_tensors(outer)] == [Tensor] * 3
    copied = cloned(outer)
    inner.scale.fill_(9.0)
    assert copied.scale.scale != 9.0 and parts_of(copied.scale) is not None


def test_attributes_of_a_subclass_are_restored():
    slot = Snapshot()
    holder = torch.nn.Module()
    holder.state_dict = lambda: {"value": labeled(torch.ones(2), ["a"])}
    seen = []
    holder.load_state_dict = seen.append
    slot.take({"x": holder}, 1, None)
    assert slot.nonfinite() == []
    slot.restore({"x": holder})
    (loaded,) = [state["value"] for state in seen]
    assert type(loaded) is Labeled and loaded.label == ["a"] and loaded.tolist() == [1.0, 1.0]


class Closed(Tensor):
    """A tensor without memory and without operations."""

    @staticmethod
    def __new__(cls, shape):
        return Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func}")


def test_a_tensor_that_cannot_be_copied_is_named():
    opt = train(made(), range(1))
    opt.state[parameters_of(opt)[0]]["momentum"] = Closed((3, 4))
    with pytest.raises(TypeError, match=r"optimizer\.state\.0\.momentum is a Closed"):
        Rollback(opt, {})
    with pytest.raises(CannotCopy, match="__tensor_flatten__"):
        cloned(opt.state[parameters_of(opt)[0]]["momentum"])


def test_state_that_cannot_be_copied_is_named_in_the_first_step(tmp_path):
    class Closing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["odd"] = Closed((3, 4))

    for store in (None, CheckpointStore(tmp_path)):
        p = torch.nn.Parameter(torch.ones(3))
        opt = GuardedOptimizer(Closing([p], lr=0.1))
        rollback = Rollback(opt, {}, every=100, store=store)
        opt.step(loss=float("nan"))
        rollback.step()
        p.grad = torch.ones(3)
        opt.step()
        with pytest.raises(TypeError, match=r"optimizer\.state\.0\.odd is a Closed"):
            rollback.step()


@pytest.mark.parametrize(
    ("value", "called"),
    [
        (threading.Lock(), "a lock that cannot be copied .*; remove the object from state_dict"),
        (torch.empty(3, device="meta"), r"a Tensor \(torch.float32, torch.strided, meta\) that"),
    ],
    ids=["lock", "meta"],
)
def test_values_that_cannot_be_copied_are_named(value, called):
    opt = train(made(), range(1))
    opt.state[parameters_of(opt)[0]]["momentum"] = {"inner": [value]}
    with pytest.raises(TypeError, match=rf"optimizer\.state\.0\.momentum\.inner\.0 is {called}"):
        Rollback(opt, {})


@pytest.mark.filterwarnings("ignore:The PyTorch API of (MaskedTensors|nested tensors)")
def test_a_class_with_its_own_deepcopy_is_rolled_back():
    """MaskedTensors and strided nested tensors cannot be split into plain tensors."""
    masked = torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    opt = train(made(), range(1))
    state = opt.state[parameters_of(opt)[0]]
    state.update(masked=masked, nested=nested)
    Rollback(opt, {}, after_skips=1).step()
    taken = Snapshot()
    taken.take({"optimizer": opt}, 1, None)
    assert taken.nonfinite() == []
    taken.restore({"optimizer": opt})
    state = opt.state[parameters_of(opt)[0]]
    assert state["masked"] is not masked and state["nested"] is not nested
    assert repr(state["masked"]) == repr(masked)
    assert repr(state["nested"]) == repr(nested)
