"""Guards with adaptive limits can resume and be copied, and have scopes and records."""

import copy
import io
import math

import pytest
import torch

import fastguard
from fastguard import AdaGC, AdaptiveLimit, AutoClip, GuardedOptimizer, Threshold, ZClip
from guardtest.guarded import adamw, one, sgd, steps_with, train
from guardtest.training import assert_same_bits, snapshot

NAN, INF = math.nan, math.inf


class Mean(AdaptiveLimit):
    """Clips to the mean of the previous norms."""

    initial = (0.0,)

    def __init__(self, first=1.0):
        self.first = first

    def limit(self, norm, state, step):
        return torch.where(step.seen == 0, self.first, state[0])

    def learn(self, norm, state, step):
        return [state[0] + (norm - state[0]) / (step.seen + 1)]


SETTINGS = {
    "zclip": {"max_norm": ZClip(warmup=5)},
    "autoclip": {"max_norm": AutoClip(window=8)},
    "adagc": {"max_norm": AdaGC(warmup=5), "clip_scope": "tensor"},
    "zclip by tensor": {"max_norm": ZClip(warmup=5), "clip_scope": "tensor"},
    "zclip beside a spike rule": {"max_norm": ZClip(warmup=5), "spike": Threshold(1.0, "record")},
    "own": {"max_norm": Mean()},
    "own by group": {"max_norm": Mean(), "clip_scope": "group"},
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_resumed_run_is_bitwise_equal(options, fused):
    whole, part = (adamw(fused=fused, **options) for _ in range(2))
    train(whole, range(30), bad=(0, 3, 12))
    train(part, range(11), bad=(0, 3, 12))
    buffer = io.BytesIO()
    torch.save(part.state_dict(), buffer)
    buffer.seek(0)
    resumed = adamw(
        [torch.nn.Parameter(p.detach().clone()) for g in part.param_groups for p in g["params"]],
        fused=fused,
        **options,
    )
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, range(11, 30), bad=(0, 3, 12))
    assert_same_bits(snapshot(resumed), snapshot(whole))
    assert torch.equal(resumed._state.limits, whole._state.limits)
    later = [r.limit for r in whole.records()][11:]
    assert [r.limit for r in resumed.records()] == later
    assert len(set(later)) > 2 or "zclip" in str(options).lower()


def test_copies_are_independent():
    opt = adamw(max_norm=Mean())
    train(opt, range(5))
    twin = copy.deepcopy(opt)
    before = opt._state.limits.clone()
    train(twin, range(5, 9))
    assert torch.equal(opt._state.limits, before)
    assert not torch.equal(twin._state.limits, before)


@pytest.mark.parametrize("rule", [ZClip(warmup=3), AutoClip(window=8), AdaGC(warmup=3)], ids=repr)
def test_a_guard_that_has_stepped_follows_a_state_that_it_loads(rule):
    opt, other = (adamw(max_norm=rule) for _ in range(2))
    train(opt, range(12), bad=(3,))
    train(other, range(20, 25))
    twin = copy.deepcopy(opt)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for group, theirs in zip(opt.param_groups, other.param_groups, strict=True):
            for p, q in zip(group["params"], theirs["params"], strict=True):
                q.copy_(p)
    before = opt._state.limits.clone()
    for follower in (twin, other):
        train(follower, range(12, 16))
        assert torch.equal(opt._state.limits, before)
        assert not torch.equal(follower._state.limits, before)
    train(opt, range(12, 16))
    assert torch.equal(twin._state.limits, opt._state.limits)
    assert torch.equal(other._state.limits, opt._state.limits)


def test_the_limit_of_each_step_is_in_its_record():
    p, opt = one(1.0, max_norm=Mean(first=4.0))
    records = steps_with(opt, p, [2.0, 6.0, NAN, 100.0, 1.0])
    assert [r.limit for r in records] == [4.0, 2.0, 4.0, 4.0, 36.0]
    assert [r.action for r in records] == ["applied", "clipped", "skipped", "clipped", "applied"]
    assert records[3].clip_coef == pytest.approx(0.04, rel=1e-12)
    assert records[0].as_dict()["limit"] == 4.0


def test_a_fixed_limit_is_in_each_record_too():
    p, opt = one(3.0, max_norm=2.0)
    assert [r.limit for r in steps_with(opt, p, [1.0])] == [2.0]
    p, opt = one(3.0)
    assert steps_with(opt, p, [1.0])[0].as_dict()["limit"] == "Infinity"


def test_the_recorded_limit_of_several_tensors_is_the_joint_limit():
    """During the warm-up of AdaGC, the joint limit is `max_norm`."""
    opt = adamw(max_norm=AdaGC(warmup=3, max_norm=0.25), clip_scope="tensor")
    train(opt, range(3))
    assert [r.limit for r in opt.records()] == pytest.approx([0.25] * 3)


def test_a_param_group_may_keep_a_fixed_limit():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "max_norm": 0.5}, {"params": [c], "max_norm": INF}]
    opt = sgd(groups, max_norm=Mean(), clip_scope="group")
    for _ in range(2):
        for p in (a, b, c):
            p.grad = torch.tensor([4.0])
        opt.step()
    assert [p.item() for p in (a, b, c)] == pytest.approx([-5.0, -1.0, -8.0])
    assert opt._state.limits[0].tolist() == [2.0, 2.0, 2.0]


def test_a_param_group_added_later_starts_with_an_empty_state():
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    opt = sgd([p], max_norm=Mean(), clip_scope="tensor")
    steps_with(opt, p, [4.0, 4.0])
    opt.add_param_group({"params": [q]})
    p.grad, q.grad = torch.tensor([9.0]), torch.tensor([9.0])
    opt.step()
    assert opt._state.limits[0].tolist() == [3.0, 1.0]
    assert (p.item(), q.item()) == pytest.approx((-9.0, -1.0))


def test_the_rule_may_change_between_steps():
    p, opt = one(1.0, max_norm=Mean())
    steps_with(opt, p, [1.0, 2.0])
    opt.max_norm = ZClip(warmup=2, max_norm=None)
    assert [r.limit for r in steps_with(opt, p, [1.0, 1.0, 3.0])] == [INF, INF, 1.0]
    opt.max_norm = 0.5
    assert steps_with(opt, p, [1.0])[0].limit == 0.5
    assert "limits" not in opt.state_dict()["fastguard"]


def test_a_rule_may_follow_another():
    p, opt = one(1.0, max_norm=AutoClip(window=4))
    steps_with(opt, p, [1.0, 2.0, 3.0])
    opt.max_norm = ZClip(warmup=2, max_norm=None)
    assert [r.limit for r in steps_with(opt, p, [1.0, 1.0, 3.0])] == [INF, INF, 1.0]
    assert opt._state.limits.squeeze(1).tolist()[:2] == [3.0, 1.0]


def test_an_optimizer_that_evaluates_its_closure_warns_that_a_rule_has_no_effect(caplog):
    p = torch.nn.Parameter(torch.ones(1))
    opt = GuardedOptimizer(torch.optim.LBFGS([p], max_iter=2), max_norm=ZClip())

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert "max_norm=ZClip(z=2.5" in caplog.text
    assert "has no effect" in caplog.text
    assert opt.records()[0].limit == INF


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "text"),
    [
        (Mean(), ZClip(), "belongs to the adaptive limit Mean, but this guard has ZClip"),
        (Mean(), 1.0, "belongs to the adaptive limit Mean, but this guard has None"),
        (None, Mean(), "belongs to the adaptive limit None, but this guard has Mean"),
        (AutoClip(window=4), AutoClip(window=5), "limits of shape (9, 1), expected (11, 1)"),
    ],
)
def test_a_state_of_another_rule_is_refused(saved_by, loaded_by, text):
    state = adamw(max_norm=saved_by).state_dict()
    opt = adamw(max_norm=loaded_by)
    before = opt._state.limits.clone()
    with pytest.raises(ValueError, match="fastguard") as caught:
        opt.load_state_dict(state)
    assert text in str(caught.value)
    assert torch.equal(opt._state.limits, before)


def test_a_damaged_state_is_refused():
    opt = adamw(max_norm=Mean())
    state = opt.state_dict()
    state["fastguard"]["limits"][1] = NAN
    with pytest.raises(ValueError, match="limits=NaN, so it is damaged"):
        opt.load_state_dict(state)


def test_an_invalid_rule_is_refused_by_name():
    with pytest.raises(TypeError, match=r"max_norm is the class ZClip; pass a rule, .*ZClip\(\)"):
        adamw(max_norm=ZClip)
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match=r"param group has max_norm=ZClip.*must be a number"):
        sgd([{"params": [p], "max_norm": ZClip()}], clip_scope="group")
    with pytest.raises(ValueError, match="clip_scope='global'"):
        sgd([{"params": [p], "max_norm": 1.0}], max_norm=ZClip())


def test_the_rule_is_in_the_description():
    assert "max_norm=AutoClip(percentile=10.0, window=9)" in repr(
        adamw(max_norm=AutoClip(window=9))
    )
    assert fastguard.ZClip is ZClip
