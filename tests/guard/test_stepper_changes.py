"""Changes between steps that select another stepper, or replace a parameter."""

import pytest
import torch

from fastguard import GuardedOptimizer
from fastguard.guard.on_device import OnDevice
from fastguard.guard.read_first import ReadFirst
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison, snapshot


def guarded_adamw(**options):
    parameters = new_parameters()
    return parameters, GuardedOptimizer(torch.optim.AdamW(parameters, lr=0.1, **options))


def steps(parameters, opt, numbers, bad=()):
    for i in numbers:
        give_gradients(parameters, i)
        if i in bad:
            poison(parameters)
        before = snapshot(opt)
        opt.step()
        if i in bad:
            assert_same_bits(snapshot(opt), before)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("to", [{"fused": False}, {"fused": None, "foreach": True},
                                {"foreach": True}], ids=str)  # fmt: skip
def test_fused_set_to_false_after_construction(cls, to):
    parameters = new_parameters()
    opt = GuardedOptimizer(cls(parameters, lr=0.1, fused=True))
    steps(parameters, opt, range(3), bad={1})
    opt.param_groups[0].update(to)
    steps(parameters, opt, range(3, 6), bad={4})
    assert type(opt._stepper) is ReadFirst
    assert (opt.applied_steps, opt.skipped_steps) == (4, 2)


def test_fused_in_one_of_two_groups_and_back():
    parameters = new_parameters()
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    opt = GuardedOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True))
    steps(parameters, opt, range(2))
    opt.param_groups[1]["fused"] = False
    assert "after reading the verdict" in opt.describe()  # changes before the next step
    steps(parameters, opt, range(2, 5), bad={3})
    assert type(opt._stepper) is ReadFirst
    opt.param_groups[1]["fused"] = True
    steps(parameters, opt, range(5, 8), bad={6})
    assert type(opt._stepper) is OnDevice
    assert (opt.applied_steps, opt.skipped_steps) == (6, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_dict_loaded_into_the_wrapped_optimizer_selects_the_stepper(fused):
    parameters, opt = guarded_adamw(fused=fused)
    others, other = guarded_adamw(fused=not fused)
    steps(others, other, range(2))
    opt.optimizer.load_state_dict(other.optimizer.state_dict())
    steps(parameters, opt, range(2, 5), bad={3})
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)
    # torch supports found_inf only if `fused` was passed to the constructor
    assert type(opt._stepper) is ReadFirst


@pytest.mark.parametrize("alone", [True, False], ids=["own group", "shared group"])
@pytest.mark.parametrize("how", ["exchanged", "state cleared", "state loaded twice"])
def test_a_removed_momentum_buffer_is_not_left_uninitialized_by_a_skip(how, alone):
    def run(bad):
        a, b, c = new_parameters([(64,), (64,), (64,)])
        groups = [{"params": [a]}, {"params": [b]}] if alone else [{"params": [a, b]}]
        opt = GuardedOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True))
        steps([a, b], opt, range(2))
        live = [a, b]
        if how == "exchanged":
            opt.param_groups[-1]["params"][-1] = c
            live = [a, c]
            if not alone:  # torch itself cannot mix first and later steps
                opt.param_groups[0]["params"][0] = new_parameters([(64,)])[0]
                live[0] = opt.param_groups[0]["params"][0]
        elif how == "state cleared":
            for p in live[-1:] if alone else live:
                opt.state[p].clear()
        else:
            for _ in range(2):  # the second state may have the address of the first
                saved = opt.optimizer.state_dict()
                for state in saved["state"].values():
                    state["momentum_buffer"] = None
                opt.optimizer.load_state_dict(saved)
        if bad:
            junk = [torch.full((64,), 7e7) for _ in range(50)]
            del junk
            steps(live, opt, [2], bad={2})
        steps(live, opt, range(3, 5))
        return {k: v for k, v in snapshot(opt).items() if v is not None}

    assert_same_bits(run(True), run(False))


def test_a_step_with_a_loaded_state_that_lacks_a_buffer_can_be_skipped():
    """torch cannot step with such a state, but skipping must work."""
    parameters = new_parameters([(8,), (8,)])
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True))
    steps(parameters, opt, range(2))
    saved = opt.optimizer.state_dict()
    saved["state"][1]["momentum_buffer"] = None
    opt.optimizer.load_state_dict(saved)
    steps(parameters, opt, [2], bad={2})
    assert opt.skipped_steps == 1
