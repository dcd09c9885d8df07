"""Copies of a guarded optimizer are independent."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from fastguard import AdaGC, AutoClip, ZClip
from guardtest.guarded import SPIKES, adamw, train
from guardtest.training import assert_same_bits, new_parameters, snapshot


def pickled(opt):
    return pickle.loads(pickle.dumps(opt))


def saved(opt):
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_copy_is_independent(copied, flat):
    """A scheduler sets `step` on the instance, bound to the original guard."""
    parameters = new_parameters()
    names = [(f"w{i}", p) for i, p in enumerate(parameters)]
    opt = adamw(parameters, max_norm=1.0, spike=SPIKES, named_parameters=names, flat_buckets=flat)
    schedulers.LambdaLR(opt, lambda epoch: 1.0)
    opt.register_step_post_hook(lambda *_: None)
    train(opt, range(4), bad={2})
    twin = copied(opt)
    before = snapshot(opt)
    assert_same_bits(snapshot(twin), before)
    train(twin, range(4, 8), bad={5})
    assert_same_bits(snapshot(opt), before)
    assert (opt.applied_steps, twin.applied_steps) == (3, 6)
    train(opt, range(4, 8), bad={5})
    assert_same_bits(snapshot(twin), snapshot(opt))
    assert [r.culprits for r in twin.records()[-3:]] == [(("w3", 1, 0, 0),), (), ()]
    twin.add_param_group({"params": new_parameters([(7,)])})
    train(twin, [8])
    assert twin.applied_steps == 7


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("limit", [ZClip(warmup=2), AutoClip(window=3), AdaGC(warmup=2)])
def test_a_copy_has_what_an_adaptive_limit_has_learned(copied, limit):
    scope = "tensor" if isinstance(limit, AdaGC) else "global"
    opt = adamw(new_parameters(), max_norm=limit, clip_scope=scope)
    train(opt, range(4), bad={2})
    twin = copied(opt)
    train(opt, range(4, 8))
    train(twin, range(4, 8))
    assert_same_bits(snapshot(twin), snapshot(opt))
    assert [r.limit for r in twin.records()[-4:]] == [r.limit for r in opt.records()[-4:]]


def test_a_hook_inside_the_step_may_copy_the_guard():
    opt = adamw(new_parameters(), max_norm=ZClip(warmup=2))
    copies = []
    opt.optimizer.register_step_post_hook(lambda *_: copies.append(copy.deepcopy(opt)))
    train(opt, range(4))
    train(copies[-1], range(4, 6))
    assert copies[-1].steps_taken >= 5
