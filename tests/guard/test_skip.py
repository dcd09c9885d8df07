"""A skipped step changes no bit of the weights and of the optimizer's state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastguard import GuardedOptimizer
from fastguard.guard.on_device import OnDevice
from fastguard.guard.read_first import ReadFirst
from guardtest.training import (
    NONFINITE,
    SPECIAL,
    assert_same_bits,
    give_gradients,
    new_parameters,
    obeys_found_inf,
    optimizer_classes,
    parameters_for,
    poison,
    snapshot,
    variants,
)

VARIANTS = variants()
WITH_BOTH_STEPPERS = [
    pytest.param(cls, kwargs, stepper, id=f"{name}-{stepper}")
    for name, cls, kwargs in VARIANTS
    for stepper in (
        ("found_inf", "read_first") if obeys_found_inf(cls, kwargs) else ("read_first",)
    )
]
BAD_STEPS = {"first": {0}, "middle": {2}, "in-a-row": {2, 3, 4}, "first-in-a-row": {0, 1, 2}}


def guard(cls, kwargs, stepper, **options):
    parameters = parameters_for(cls)
    inner = cls(parameters, **kwargs)
    opt = GuardedOptimizer(inner, **options)
    assert type(opt._stepper) is (OnDevice if obeys_found_inf(cls, kwargs) else ReadFirst)
    if stepper == "read_first":
        inner.register_step_pre_hook(lambda *_: None)  # must run only if the optimizer steps
    return opt, parameters


def test_every_optimizer_of_torch_is_tested():
    tested = {cls for _, cls, _ in VARIANTS}
    assert tested | set(SPECIAL) == set(optimizer_classes())
    assert {cls.__name__ for _, cls, kwargs in VARIANTS if kwargs.get("fused")} >= {
        "Adam",
        "AdamW",
        "SGD",
        "Adagrad",
    }


@pytest.mark.parametrize("bad", BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize(("cls", "kwargs", "stepper"), WITH_BOTH_STEPPERS)
def test_a_skipped_step_changes_nothing(cls, kwargs, stepper, bad):
    opt, parameters = guard(cls, kwargs, stepper)
    for step in range(7):
        give_gradients(parameters, step)
        if step in bad:
            poison(parameters)
        before = snapshot(opt)
        opt.step()
        after = snapshot(opt)
        if step in bad:
            created = {k: after.pop(k) for k in list(after) if k not in before}
            assert_same_bits(after, before)
            # A fused optimizer creates its state, all zeros, before it reads found_inf.
            assert not any(torch.as_tensor(v).any() for v in created.values())
            assert not created or stepper == "found_inf"
        else:
            assert not torch.equal(before["p0"], after["p0"])
    assert (opt.applied_steps, opt.skipped_steps) == (7 - len(bad), len(bad))

    alone_parameters = parameters_for(cls)
    alone = cls(alone_parameters, **kwargs)
    for step in sorted(set(range(7)) - bad):
        give_gradients(alone_parameters, step)
        alone.step()
    assert_same_bits(snapshot(opt), snapshot(alone))


@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("stepper", ["found_inf", "read_first"])
def test_every_kind_of_nonfinite_element_skips(kind, stepper):
    opt, parameters = guard(torch.optim.AdamW, {"fused": True}, stepper)
    for step in range(3):
        give_gradients(parameters, step)
        if step == 1:
            poison(parameters, NONFINITE[kind], at=1)
            before = snapshot(opt)
            opt.step()
            assert_same_bits(snapshot(opt), before)
        else:
            opt.step()
    assert [r.action for r in opt.records()] == ["applied", "skipped", "applied"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_buffer_created_late_is_never_left_uninitialized(nesterov):
    """Fused SGD allocates the buffer in the step; a skip on the device would not initialize it."""

    def build():
        # Torch needs a separate param group for gradients that appear late.
        parameters = new_parameters()
        groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
        return parameters, torch.optim.SGD(
            groups, lr=0.1, momentum=0.9, nesterov=nesterov, fused=True
        )

    parameters, inner = build()
    alone_parameters, alone = build()
    opt = GuardedOptimizer(inner)
    for step in range(5):
        present = slice(0, 2) if step < 2 else slice(None)
        give_gradients(parameters[present], step)
        if step == 2:
            poison(parameters)
            opt.step()
            assert "momentum_buffer" not in opt.state.get(parameters[2], {})
            continue
        opt.step()
        give_gradients(alone_parameters[present], step)
        alone.step()
    assert_same_bits(snapshot(opt), snapshot(alone))


def test_found_inf_in_the_fused_kernel_is_exactly_0_or_1():
    """The kernel tests `found_inf == 1`, so 2.0 would apply NaN."""
    parameters = new_parameters()
    inner = torch.optim.AdamW(parameters, fused=True)
    opt = GuardedOptimizer(inner)
    seen = []
    plain_step = inner.step
    inner.step = lambda: (seen.append((inner.found_inf.clone(), inner.grad_scale)), plain_step())
    for step in range(3):
        give_gradients(parameters, step)
        if step == 1:
            for i in range(len(parameters)):
                poison(parameters, at=i)
        opt.step()
    assert [found_inf.item() for found_inf, _ in seen] == [0.0, 1.0, 0.0]
    for found_inf, grad_scale in seen:
        assert found_inf.dtype == torch.float32
        assert found_inf.shape == ()
        assert grad_scale is None
    assert not hasattr(inner, "found_inf")
    assert not hasattr(inner, "grad_scale")


@pytest.mark.parametrize("removed", ["momentum_buffer", "set to None", "step"])
def test_state_that_was_removed_by_hand_is_no_error_in_a_bad_step(removed):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    if removed == "step":
        inner = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    else:
        inner = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)
    opt = GuardedOptimizer(inner)

    def step(gradient):
        for p in parameters:
            p.grad = torch.full((3,), gradient)
        opt.step()

    step(1.0)
    state = opt.state[parameters[1]]
    name = "step" if removed == "step" else "momentum_buffer"
    kept = state.pop(name)
    if removed == "set to None":
        state[name] = None
    before = [p.tolist() for p in parameters]
    step(float("nan"))
    assert [p.tolist() for p in parameters] == before
    with pytest.raises((TypeError, KeyError)):  # as without the guard
        step(1.0)
    state[name] = kept
    step(1.0)
    assert [r.action for r in opt.records()] == ["applied", "skipped", "applied"]


def test_an_error_in_the_fused_step_leaves_no_attribute_behind():
    parameters = new_parameters()
    inner = torch.optim.AdamW(parameters, fused=True)
    opt = GuardedOptimizer(inner)

    def fail(*_):
        raise KeyError("hook")

    inner.register_step_pre_hook(fail)
    give_gradients(parameters, 0)
    with pytest.raises(KeyError, match="hook"):
        opt.step()
    assert not hasattr(inner, "found_inf")


def test_optimizers_that_ignore_found_inf_are_not_called():
    """NAdam, RAdam, RMSprop and others would silently apply the NaN."""
    for name, cls, kwargs in VARIANTS:
        if obeys_found_inf(cls, kwargs):
            continue
        parameters = parameters_for(cls)
        inner = cls(parameters, **kwargs)
        calls = []
        inner.register_step_pre_hook(lambda *_, calls=calls: calls.append(1))
        opt = GuardedOptimizer(inner)
        give_gradients(parameters, 0)
        poison(parameters)
        opt.step()
        assert not calls, name


def test_a_param_group_that_is_not_fused_needs_reading_first():
    a, b = new_parameters([(3,), (2,)])
    inner = torch.optim.AdamW([{"params": [a], "fused": True}, {"params": [b], "foreach": True}])
    opt = GuardedOptimizer(inner)
    assert type(opt._stepper) is ReadFirst
    give_gradients([a, b], 0)
    poison([a, b])
    before = snapshot(opt)
    opt.step()
    assert_same_bits(snapshot(opt), before)


def test_a_later_group_that_is_not_fused_changes_the_stepper():
    a, b = new_parameters([(3,), (2,)])
    inner = torch.optim.AdamW([a], fused=True)
    opt = GuardedOptimizer(inner)
    give_gradients([a], 0)
    opt.step()
    inner.add_param_group({"params": [b], "fused": False, "foreach": True})
    for step in range(1, 4):
        give_gradients([a, b], step)
        before = snapshot(opt)
        if step == 2:
            poison([a, b])
            opt.step()
            assert_same_bits(snapshot(opt), before)
        else:
            opt.step()
    assert (opt.applied_steps, opt.skipped_steps) == (3, 1)


def fused_with_hook(parameters):
    inner = torch.optim.AdamW(parameters, fused=True)
    inner.register_step_post_hook(lambda *_: None)
    return inner


@pytest.mark.parametrize(
    ("inner", "mode", "expected"),
    [
        (lambda ps: torch.optim.AdamW(ps, fused=True), "skip", True),
        (lambda ps: torch.optim.AdamW(ps, fused=True), "zero", True),
        (lambda ps: torch.optim.AdamW(ps, fused=True), "raise", False),
        (torch.optim.NAdam, "skip", False),
        (torch.optim.LBFGS, "skip", False),
        (fused_with_hook, "skip", False),
    ],
    ids=["fused", "zero", "raise", "NAdam", "LBFGS", "inner hook"],
)
def test_sync_free_says_whether_a_step_waits_for_the_device(inner, mode, expected):
    opt = GuardedOptimizer(inner(new_parameters()), nonfinite=mode)
    assert opt.sync_free  # a CPU never waits
    opt._device = torch.device("meta")  # any device other than the host
    assert opt.sync_free is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("kwargs", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_16_bit_training_without_a_scaler_skips_and_logs_it(dtype, kind, kwargs, caplog):
    """A GradScaler would not skip with bfloat16, and does not report skips."""
    parameters = new_parameters(dtype=dtype)
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    inner = torch.optim.AdamW(parameters, lr=0.1, **kwargs)
    opt = GuardedOptimizer(inner, max_norm=1.0, named_parameters=named)
    for step in range(4):
        give_gradients(parameters, step)
        before = snapshot(opt)
        if step == 2:
            poison(parameters, NONFINITE[kind], at=1)
            opt.step(tag="batch 7")
            assert_same_bits(snapshot(opt), before)
        else:
            opt.step()
            assert not torch.equal(snapshot(opt)["p0"], before["p0"])
    assert [r.action == "skipped" for r in opt.records()] == [False, False, True, False]
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    message = warning.getMessage()
    assert "step 3 skipped (tag batch 7) because of nonfinite_grad" in message
    assert "w1" in message


def test_skipping_never_multiplies_by_zero():
    """0 * NaN is NaN, so a skip selects values instead of multiplying."""
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1), max_norm=1e-3)
    give_gradients(parameters, 0)
    poison(parameters, at=0)
    before = [p.grad.clone() for p in parameters]
    opt.step()
    assert all(map(torch.equal, [p.grad.nan_to_num(7.0) for p in parameters],
                   [g.nan_to_num(7.0) for g in before]))  # fmt: skip


models = st.lists(
    st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5
)


@settings(max_examples=60)
@given(
    shapes=models,
    where=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    kind=st.sampled_from(sorted(NONFINITE)),
    bad=st.sets(st.integers(0, 4), min_size=1, max_size=4),
    fused=st.booleans(),
    flat=st.booleans(),
    max_norm=st.sampled_from([None, 0.1, 1e9]),
    scope=st.sampled_from(["global", "group", "tensor"]),
)
def test_skip_is_the_identity(shapes, where, kind, bad, fused, flat, max_norm, scope):
    """This holds for any model, position of the bad element, and settings of the guard."""

    def train(bad, left_out):
        parameters = new_parameters(shapes)
        inner = torch.optim.AdamW(parameters, lr=0.1, fused=fused, weight_decay=0.1)
        opt = GuardedOptimizer(inner, max_norm=max_norm, clip_scope=scope, flat_buckets=flat)
        for step in range(5):
            if step in left_out:
                continue
            give_gradients(parameters, step)
            full = [p for p in parameters if p.numel()]
            if step in bad and full:
                grad = full[where[0] % len(full)].grad.view(-1)
                grad[where[1] % len(grad)] = NONFINITE[kind]
                before = snapshot(opt)
                opt.step()
                after = snapshot(opt)
                assert_same_bits({k: after[k] for k in before}, before)
            elif full or step not in bad:
                opt.step()
        return opt

    guarded, alone = train(bad, set()), train(set(), bad)
    if all(0 in shape for shape in shapes):
        return  # no element to make bad
    assert guarded.skipped_steps == len(bad)
    assert_same_bits(snapshot(guarded), snapshot(alone))


def test_a_model_without_gradients_steps_as_torch_does():
    model = nn.Linear(2, 2)
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), max_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert opt.records()[0].total_norm == 0.0
