"""Arguments that must be numbers reject bools, text, and integers beyond the largest float."""

import math
import warnings
from array import array
from collections import UserString
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import fastguard
from fastguard.checkpoints.arguments import integer
from fastguard.diagnosis.replay.arguments import check_loss_scale
from fastguard.errors.checked_numbers import count_of, finite_number_of, number_of

HUGE = 10**400


def parameters():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    return [p]


def guarded(params=None, **options):
    return fastguard.GuardedOptimizer(torch.optim.SGD(params or parameters(), lr=1.0), **options)


def in_a_group(**settings):
    return guarded([{"params": parameters(), **settings}], clip_scope="group")


def written_later(value):
    opt = in_a_group()
    opt.param_groups[0]["max_norm"] = value
    opt.step()


def lr_of(**options):
    return fastguard.GuardedLR(guarded(), **options)


def config(section, **settings):
    return fastguard.GuardConfig.from_dict({section: settings})


def configured(**settings):
    model = nn.Linear(1, 1)
    return config("guard", **settings).wrap(model, torch.optim.SGD(model.parameters()))


TAKERS = {
    "clip_grad_norm_": lambda x: fastguard.clip_grad_norm_(parameters(), x),
    "clip_grads_with_norm_": lambda x: fastguard.clip_grads_with_norm_(
        parameters(), x, torch.tensor(5.0)
    ),
    "total_norm": lambda x: fastguard.clip_grads_with_norm_(parameters(), 1.0, x),
    "clip_grad_value_": lambda x: fastguard.clip_grad_value_(parameters(), x),
    "sanitize_grads_ nan": lambda x: fastguard.sanitize_grads_(parameters(), nan=x),
    "sanitize_grads_ neginf": lambda x: fastguard.sanitize_grads_(parameters(), neginf=x),
    "FlatGradBuckets": lambda x: fastguard.FlatGradBuckets(parameters()).clip_grad_norm_(x),
    "max_norm": lambda x: guarded(max_norm=x),
    "max_norm of a group": lambda x: in_a_group(max_norm=x),
    "clip_value of a group": lambda x: in_a_group(clip_value=x),
    "max_norm of a new group": lambda x: in_a_group().add_param_group(
        {"params": parameters(), "max_norm": x}
    ),
    "max_norm written later": written_later,
    "SpikeRule": lambda x: fastguard.SpikeRule(sigma=x),
    "Threshold": lambda x: fastguard.Threshold(max=x),
    "backoff": lambda x: lr_of(backoff=x),
    "floor": lambda x: lr_of(floor=x),
    "floors": lambda x: lr_of(floor=[x]),
    "lower": lambda x: lr_of().lower(x),
    "Warmup lr": lambda x: fastguard.Warmup(3, lr=x),
    "Warmup momentum": lambda x: fastguard.Warmup(3, momentum=(x,)),
    "lr_factor": lambda x: fastguard.Rollback(guarded(), {}, lr_factor=x),
    "LossMeter": lambda x: fastguard.LossMeter().update(1.0, weight=x),
    "ActivationGuard": lambda x: fastguard.ActivationGuard(nn.Linear(1, 1), limit=x),
    "check_batch": lambda x: fastguard.check_batch(torch.zeros(2), high=x),
    "GuardConfig max_norm": lambda x: config("guard", max_norm=x),
    "GuardConfig clip_value": lambda x: config("groups", **{"*": {"clip_value": x}}),
    "GuardConfig sigma": lambda x: config("spike", grad_norm={"sigma": x}),
    "GuardConfig max": lambda x: config("spike", grad_norm={"max": x}),
    "GuardConfig lr_factor": lambda x: config("rollback", lr_factor=x),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
def test_bools_and_texts_are_not_numbers(take):
    for wrong in (True, False, "1.0", b"1", np.True_, torch.tensor(True), memoryview(b"1.0")):
        with pytest.raises(TypeError):
            take(wrong)


@pytest.mark.parametrize(
    "value",
    [
        memoryview(b"1.0"),
        array("b", b"1.0"),
        UserString("1.0"),
        np.array("1.0", dtype=object),
        np.array(True, dtype=object),
        np.void(b"1.0"),
        np.complex128(1 + 2j),
        torch.tensor(1 + 0j),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_float_would_parse_or_truncate_are_refused(value):
    with pytest.raises(TypeError, match=r"^lr=.* is not a number"):
        number_of("lr", value)


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
def test_an_integer_beyond_the_largest_float_is_named(take):
    for huge, named in (
        (HUGE, "=1000"),
        (-HUGE, "=-1000"),
        (10**5000, "=an integer of 16610 bits"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            take(huge)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("huge", [Decimal("1e400"), Decimal("-1e400"), np.longdouble("1e4000")])
def test_any_finite_number_beyond_the_largest_float_is_named(huge):
    for name in ("clip_grad_norm_", "max_norm", "Threshold", "sanitize_grads_ nan", "floor"):
        with pytest.raises(ValueError, match=r"=.*1[eE]\+400.*is beyond the largest float"):
            TAKERS[name](huge)
    assert number_of("x", Decimal("Infinity")) == number_of("x", np.longdouble("inf")) == math.inf
    assert number_of("x", torch.tensor(-math.inf)) == -math.inf


WORDS = {
    "nonfinite": lambda x: guarded(nonfinite=x),
    "nonfinite ": lambda x: fastguard.clip_grad_norm_(parameters(), 1.0, nonfinite=x),
    "foreach": lambda x: fastguard.clip_grad_norm_(parameters(), 1.0, foreach=x),
    "group": lambda x: guarded(group=x),
    "parameters": lambda x: fastguard.clip_grad_norm_(x, 1.0),
    "optimizer": fastguard.GuardedOptimizer,
    "schedule": lambda x: fastguard.GuardedLR(x, optimizer=guarded()),
    "warmup": lambda x: lr_of(warmup=x),
    "store": lambda x: fastguard.Rollback(guarded(), {}, store=x),
    "sink": lambda x: guarded().add_sink(x),
    "mode": lambda x: fastguard.ActivationGuard(nn.Linear(1, 1), x),
    "mode ": lambda x: fastguard.CheckpointStore("never", mode=x),
    "group ": lambda x: fastguard.CheckpointStore("never", group=x),
    "guard.nonfinite": lambda x: config("guard", nonfinite=x),
    "records.jsonl": lambda x: config("records", jsonl=x),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_huge_integer_where_none_is_expected_is_named(name):
    with pytest.raises((TypeError, ValueError), match=f"{name.strip()}=.*int") as error:
        WORDS[name](10**5000)
    assert "Exceeds the limit" not in str(error.value) and len(str(error.value)) < 300


COUNTS = {
    "max_consecutive_skips": lambda n: guarded(max_consecutive_skips=n),
    "SpikeRule window": lambda n: fastguard.SpikeRule(window=n),
    "SpikeRule warmup": lambda n: fastguard.SpikeRule(warmup=n),
    "recovery": lambda n: lr_of(recovery=n),
    "Warmup steps": lambda n: fastguard.Warmup(n),
    "every": lambda n: fastguard.Rollback(guarded(), {}, every=n),
    "keep": lambda n: fastguard.Rollback(guarded(), {}, keep=n),
    "after_skips": lambda n: fastguard.Rollback(guarded(), {}, after_skips=n),
    "max_bytes": lambda n: fastguard.JsonLinesSink("never.jsonl", max_bytes=n),
    "keep of a sink": lambda n: fastguard.JsonLinesSink("never.jsonl", keep=n),
    "step": lambda n: integer("step", n, 0),
    "GuardConfig max_consecutive_skips": lambda n: configured(max_consecutive_skips=n),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_beyond_int64_is_named(name):
    """Counters are int64, in tensors and in files."""
    argument = name.removesuffix(" of a sink").removeprefix("GuardConfig ")
    for huge in (2**63, HUGE, -HUGE, 10**5000, -(10**5000)):
        with pytest.raises(ValueError, match=f"{argument}=(-?[0-9]|an integer of)") as error:
            COUNTS[name](huge)
        assert len(str(error.value)) < 300


def test_a_window_larger_than_device_memory_is_refused():
    with pytest.raises(ValueError, match=r"window=1000000000000 must be .* at most 1048576"):
        fastguard.SpikeRule(window=10**12)
    assert fastguard.SpikeRule(window=2**20).window == 2**20


def test_integers_in_range_are_counts():
    assert count_of("n", 3, 3, 3) == 3
    for wrong in (2, 4, True, 3.0, "3", None):
        with pytest.raises(ValueError, match=r"n=.* must be None or an integer >= 3"):
            count_of("n", wrong, 3, 3, optional=True)
    with pytest.raises(ValueError, match="n=<Fraction that cannot be shown: ValueError> must"):
        count_of("n", Fraction(1, 10**5000), 3, 3)


@pytest.mark.parametrize("value", [True, torch.tensor(True)], ids=str)
def test_a_bool_is_not_a_norm_type(value):
    with pytest.raises(TypeError, match=r"norm_type=.*True.* is not a number"):
        fastguard.clip_grad_norm_(parameters(), 1.0, value)


@pytest.mark.parametrize(
    ("taker", "wrong"),
    [
        (lambda n: lr_of(recovery=n), True),
        (lambda n: fastguard.Warmup(n), True),
        (lambda n: fastguard.SpikeRule(window=n), True),
        (lambda n: fastguard.JsonLinesSink("records.jsonl", keep=n), True),
        (lambda n: guarded(max_consecutive_skips=n), True),
        (lambda n: fastguard.Rollback(guarded(), {}, after_skips=n), True),
    ],
)
def test_a_bool_is_not_a_count(taker, wrong):
    with pytest.raises(ValueError, match="=True must be"):
        taker(wrong)


def test_a_bool_is_not_a_loss_scale():
    with pytest.raises(TypeError, match="loss_scale=True"):
        check_loss_scale(True)


def test_numbers_of_many_types_are_accepted():
    for one in (1, 1.0, np.float16(1), np.int8(1), Fraction(1), torch.ones(()), torch.ones(1, 1)):
        number = number_of("x", one)
        assert type(number) is float and number == 1.0
    assert math.isnan(number_of("x", math.nan))
    for wrong in (None, [1.0], 1j, torch.ones(2), object(), np.array("1")):
        with pytest.raises(TypeError, match=r"x=.*is not a number.*; use a number"):
            number_of("x", wrong)
    for infinite in (math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a finite number"):
            finite_number_of("x", infinite)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("wrong", [True, "1.0"], ids=repr)
def test_compiled_calls_raise_the_same_errors(wrong, fullgraph):
    """With fullgraph=True, dynamo wraps the error in its own message."""
    expected = torch._dynamo.exc.Unsupported if fullgraph else TypeError
    for take in (TAKERS["clip_grad_norm_"], TAKERS["clip_grad_value_"]):
        params = parameters()

        def call(take=take):
            return take(wrong)

        torch._dynamo.reset()
        with pytest.raises(expected):
            torch.compile(call, backend="eager", fullgraph=fullgraph)()
        assert params[0].grad.tolist() == [3.0, 4.0]


# A limit of 0.


def warnings_of(call, times=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    return [w for w in caught if "sets every gradient to zero" in str(w.message)]


def test_a_limit_of_zero_acts_as_in_torch_and_warns_once():
    params = parameters()
    (warning,) = warnings_of(lambda: fastguard.clip_grad_norm_(params, 0))
    assert "max_norm=0 " in str(warning.message) and "max_norm=None" in str(warning.message)
    assert warning.filename == __file__
    assert params[0].grad.tolist() == [0.0, 0.0]
    assert len(warnings_of(lambda: fastguard.clip_grad_value_(parameters(), 0.0))) == 1
    buckets = fastguard.FlatGradBuckets(parameters())
    assert len(warnings_of(lambda: buckets.clip_grad_norm_(0.0))) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: guarded(max_norm=0),
        lambda: in_a_group(max_norm=0.0),
        lambda: in_a_group(clip_value=0),
        lambda: configured(max_norm=0),
    ],
    ids=["guard", "group", "clip_value", "config"],
)
def test_a_guard_with_a_limit_of_zero_warns_once(make):
    made = []

    def run():
        if not made:
            made.append(make())
        opt = getattr(made[0], "optimizer", made[0])
        if isinstance(opt, fastguard.GuardedOptimizer):
            opt.step()

    assert len(warnings_of(run)) == 1


def test_other_limits_do_not_warn():
    assert not warnings_of(lambda: fastguard.clip_grad_norm_(parameters(), 1e-300))
    assert not warnings_of(lambda: guarded(max_norm=None).step())
