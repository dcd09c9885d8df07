"""Arguments of spike rules; decisions are tested in tests/stages/decide and tests/guard."""

import math

import pytest

from fastguard import SpikeRule, Threshold
from fastguard.stages.spike_rules import MissingLosses, rules_by_signal


def test_one_rule_is_for_the_gradient_norm():
    rule = SpikeRule()
    assert rules_by_signal(rule) == {"grad_norm": rule}
    assert rules_by_signal(None) == {}
    both = {"grad_norm": Threshold(max=3.0, action="clip"), "ce": SpikeRule(action="record")}
    assert rules_by_signal(both) == both


def test_an_integer_limit_gives_an_equal_rule_with_equal_repr():
    assert repr(SpikeRule(sigma=6)) == repr(SpikeRule(sigma=6.0))
    assert repr(Threshold(max=100)) == repr(Threshold(max=100.0))


def test_the_defaults_suit_long_runs():
    assert SpikeRule() == SpikeRule(window=128, sigma=6.0, warmup=64, action="skip")
    assert Threshold(max=1.0).action == "skip"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 1, "warmup": 1}, "window=1 must be an integer >= 2"),
        ({"window": 8.0}, "window=8.0"),
        ({"window": math.nan}, "window=nan"),
        ({"warmup": 1}, "warmup=1 must be an integer from 2 to window=128"),
        ({"warmup": 129}, "warmup=129"),
        ({"warmup": 2.5}, "warmup=2.5"),
        ({"sigma": 0}, "sigma=0 must be a finite number > 0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": math.inf}, "sigma=inf"),
        ({"action": "stop"}, "action='stop' is unknown; use one of skip, clip, record"),
    ],
)
def test_a_bad_spike_rule_names_the_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        SpikeRule(**wrong)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, 10**400], ids=str)
def test_a_bad_threshold_names_the_value(value):
    with pytest.raises(ValueError, match="Threshold max="):
        Threshold(max=value)


@pytest.mark.parametrize("value", ["6", True, None], ids=repr)
def test_a_non_number_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"SpikeRule sigma={value!r} is not a number"):
        SpikeRule(sigma=value)
    with pytest.raises(TypeError, match=f"Threshold max={value!r} is not a number"):
        Threshold(max=value)
    with pytest.raises(ValueError, match=r"SpikeRule w.*must be an integer"):
        SpikeRule(window=value)


def test_a_threshold_with_an_unknown_action():
    with pytest.raises(ValueError, match="Threshold action='halt'"):
        Threshold(max=1.0, action="halt")


@pytest.mark.parametrize(
    ("spike", "error", "message"),
    [
        (6.0, TypeError, "spike=6.0 is a number, not a rule"),
        ([SpikeRule()], TypeError, "must be a SpikeRule, a Threshold, or a dict"),
        ({"loss": 5.0}, TypeError, r"spike\['loss'\]=5.0"),
        ({3: SpikeRule()}, TypeError, r"spike\[3\]"),
        ({"loss": SpikeRule(action="clip")}, ValueError, "only 'grad_norm' can be clipped"),
        ({"loss": Threshold(1.0, "clip")}, ValueError, "only 'grad_norm' can be clipped"),
    ],
)
def test_an_invalid_spike_argument_is_refused(spike, error, message):
    with pytest.raises(error, match=message):
        rules_by_signal(spike)


def warned_after(rules, losses, steps, caplog):
    """Returns the warnings after some steps, and whether the check has ended."""
    caplog.clear()
    missing = MissingLosses.of(dict.fromkeys(rules, Threshold(1.0)))
    for _ in range(steps):
        missing = None if missing is None else missing.after(losses)
    return [r.getMessage() for r in caplog.records], missing is None


def test_a_rule_on_a_loss_that_is_never_passed_warns_once(caplog):
    assert warned_after(["loss"], ["loss"], 1, caplog) == ([], True)
    assert warned_after(["grad_norm"], [], 1, caplog) == ([], True)
    assert warned_after(["recontruction"], ["reconstruction"], 99, caplog) == ([], False)
    (message,), done = warned_after(["recontruction", "kl"], ["reconstruction", "kl"], 300, caplog)
    assert done
    assert "the spike rule on 'recontruction' received no value in 100 steps" in message
    assert "did you mean 'reconstruction'" in message and "'kl'" not in message.split("passed")[0]
    (message,), _ = warned_after(["loss"], [], 100, caplog)
    assert "no loss was passed" in message and "opt.step(loss=" in message
    (message,), _ = warned_after(["gradnorm"], ["loss"], 100, caplog)
    assert "did you mean 'grad_norm'" in message


def test_losses_passed_in_single_steps_count(caplog):
    missing = MissingLosses.of({"a": Threshold(1.0), "b": Threshold(1.0)})
    for given in (["a"], [], ["b"]):
        assert missing is not None
        missing = missing.after(given)
    assert missing is None and not caplog.records
