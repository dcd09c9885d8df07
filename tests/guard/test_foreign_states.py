"""States of other optimizers, torch versions and dtypes are loaded exactly or refused."""

import copy

import pytest
import torch

from fastguard import GuardedOptimizer
from guardtest.training import (
    SPECIAL,
    assert_same_bits,
    give_gradients,
    new_parameters,
    optimizer_classes,
    snapshot,
)

CLASSES = {cls.__name__: cls for cls in optimizer_classes() if cls not in SPECIAL}
MATRICES = [(3, 4), (4, 2)]  # Muon supports only matrices
pytestmark = pytest.mark.filterwarnings("ignore:the state dict has no 'fastguard' entry")


def stepped(opt, steps):
    for step in steps:
        give_gradients([p for group in opt.param_groups for p in group["params"]], step)
        opt.step()
    return opt


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("own", CLASSES)
@pytest.mark.parametrize("other", CLASSES)
def test_the_state_of_another_optimizer_is_refused_or_steps(own, other, trained):
    foreign = stepped(CLASSES[other](new_parameters(MATRICES)), range(2)).state_dict()
    opt = GuardedOptimizer(CLASSES[own](new_parameters(MATRICES)))
    if trained:
        stepped(opt, range(2))
    before = snapshot(opt)
    try:
        opt.load_state_dict(foreign)
    except ValueError as error:
        assert own != other and own in str(error)
        assert_same_bits(snapshot(opt), before)
    stepped(opt, [2])
    assert opt.steps_taken == 1 + 2 * (trained and opt.applied_steps == 3)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_state_of_other_shapes_is_refused(name, trained):
    foreign = stepped(CLASSES[name](new_parameters([(3, 4), (5, 2)]), lr=0.1), range(2))
    if not foreign.state:
        pytest.skip(f"{name} keeps no state")
    opt = GuardedOptimizer(CLASSES[name](new_parameters(MATRICES), lr=0.1))
    if trained:
        stepped(opt, range(2))
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"of shape \(.*load a state dict of the same model"):
        opt.load_state_dict(foreign.state_dict())
    assert_same_bits(snapshot(opt), before)


def test_the_state_of_lbfgs_over_other_shapes_is_refused():
    def lbfgs(shape):
        (p,) = new_parameters([shape])
        opt = GuardedOptimizer(torch.optim.LBFGS([p], max_iter=2))

        def closure():
            opt.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        return opt, closure

    (other, step_other), (opt, step) = lbfgs((4,)), lbfgs((3,))
    other.step(step_other)
    opt.step(step)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"of shape \(4,\)"):
        opt.load_state_dict(other.state_dict())
    assert_same_bits(snapshot(opt), before)


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_of_an_older_torch_still_load(name):
    """Older state dicts lack newer settings and contain steps as plain numbers."""
    later = (
        "foreach",
        "maximize",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
    )
    parameters = new_parameters(MATRICES)
    saved = copy.deepcopy(stepped(CLASSES[name](parameters), range(2)).state_dict())
    bare = CLASSES[name](new_parameters(MATRICES))
    # These two have had the same settings since they were added.
    if name not in ("Adafactor", "Muon"):
        for group in saved["param_groups"]:
            for key in later:
                group.pop(key, None)
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = int(state["step"])
    opt = GuardedOptimizer(CLASSES[name](new_parameters(MATRICES)))
    opt.load_state_dict(copy.deepcopy(saved))
    bare.load_state_dict(saved)
    assert_same_bits(snapshot(stepped(opt, [2])), snapshot(stepped(bare, [2])))


def test_a_load_hook_of_the_wrapped_optimizer_may_adapt_a_foreign_state():
    opt = GuardedOptimizer(torch.optim.AdamW(new_parameters(), lr=0.1))
    own = stepped(torch.optim.AdamW(new_parameters(), lr=0.1), range(2)).state_dict()
    opt.optimizer.register_load_state_dict_pre_hook(lambda inner, saved: own)
    opt.load_state_dict(torch.optim.SGD(new_parameters(), lr=0.1).state_dict())
    assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 2


def test_an_error_in_a_load_hook_of_the_wrapped_optimizer_changes_nothing():
    opt = stepped(GuardedOptimizer(torch.optim.AdamW(new_parameters(), lr=0.1)), range(2))
    saved = copy.deepcopy(opt.state_dict())
    stepped(opt, [2])

    def fail(inner):
        raise RuntimeError("hook")

    opt.optimizer.register_load_state_dict_post_hook(fail)
    before, state = snapshot(opt), opt.state
    with pytest.raises(RuntimeError, match="hook"):
        opt.load_state_dict(saved)
    assert_same_bits(snapshot(opt), before)
    assert opt.state is state
    assert opt.applied_steps == 3


# State that torch would cast to the dtype of the parameter.


class WithMaster(torch.optim.Optimizer):
    """SGD on a float32 copy of 16-bit weights, as in many training loops."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["master"] = p.float()
                    state["extra"] = {
                        "seen": torch.zeros((), dtype=torch.int64),
                        "all": [p.float()],
                    }
                state["step"] += 1
                state["extra"]["seen"] += 1
                state["extra"]["all"][0] += 1e-3
                state["master"] -= group["lr"] * p.grad.float()
                p.copy_(state["master"])


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", [*CLASSES, "WithMaster"])
def test_the_state_of_16_bit_parameters_is_restored_bitwise(name, trained):
    cls = CLASSES.get(name, WithMaster)

    def guard():
        return GuardedOptimizer(cls(new_parameters(MATRICES, torch.bfloat16)))

    first, second = stepped(guard(), range(3)), guard()
    if trained:
        stepped(second, range(2))
    saved = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for p, q in zip(parameters_of(second), parameters_of(first), strict=True):
            p.copy_(q)
    second.load_state_dict(saved)
    assert_same_bits(snapshot(second), snapshot(first))
    stepped(first, range(3, 6))
    stepped(second, range(3, 6))
    assert_same_bits(snapshot(second), snapshot(first))


def test_a_restored_state_shares_no_memory_with_the_saved_one():
    opt = stepped(GuardedOptimizer(WithMaster(new_parameters(MATRICES, torch.bfloat16))), range(2))
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    master = saved["state"][0]["master"].clone()
    stepped(opt, [2])
    assert torch.equal(saved["state"][0]["master"], master)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_the_state_of_float32_training_follows_16_bit_parameters_as_in_torch(trained):
    """A fused kernel needs moments with the dtype of the weights."""
    saved = stepped(torch.optim.AdamW(new_parameters(), fused=True), range(2)).state_dict()
    opt = GuardedOptimizer(torch.optim.AdamW(new_parameters(dtype=torch.bfloat16), fused=True))
    if trained:
        stepped(opt, range(2))
    opt.load_state_dict(saved)
    state = opt.state[parameters_of(opt)[0]]
    assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.bfloat16, torch.float32)
    stepped(opt, [2])


def parameters_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]
