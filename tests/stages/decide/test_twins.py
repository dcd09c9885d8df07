"""`cpu.decide` and `reference.decide` agree on any sequence of steps, in verdicts and in state."""

import math

import hypothesis
import torch
from hypothesis import strategies as st

from fastguard import SpikeRule, Threshold
from fastguard.stages.contract import GuardState, Verdict
from guardtest.stories import TWINS, Story

NAN, INF = math.nan, math.inf


@st.composite
def rule_sets(draw):
    rules = {}
    for signal in draw(st.lists(st.sampled_from(["grad_norm", "a", "b"]), unique=True)):
        action = draw(st.sampled_from(["skip", "record"] + ["clip"] * (signal == "grad_norm")))
        if draw(st.booleans()):
            rules[signal] = Threshold(draw(st.sampled_from([0.5, 2.0, 50.0])), action=action)
        else:
            window = draw(st.integers(2, 5))
            warmup = draw(st.integers(2, window))
            rules[signal] = SpikeRule(window, draw(st.sampled_from([0.01, 2.0])), warmup, action)
    return rules


values = st.sampled_from([0.0, 0.3, 1.0, 1.1, 30.0, 1e6])
steps = st.fixed_dictionaries(
    {
        "norms": st.tuples(values, values),
        "nan": st.sampled_from([0, 0, 0, 0, 2]),
        "posinf": st.sampled_from([0, 0, 0, 0, 1]),
        "bad_segment": st.sampled_from([0, 1]),
        "losses": st.dictionaries(
            st.sampled_from(["a", "b", "c"]), values | st.sampled_from([NAN, INF, -2.0])
        ),
        "found_inf": st.sampled_from([None, None, 0.0, 2.0]),
        "inv_scale": st.sampled_from([None, 0.5]),
        "scale_falls": st.sampled_from([None, True, True, False]),
    }
)


@hypothesis.given(
    rule_sets(),
    st.sampled_from([(INF,), (2.0,), (INF, 0.5)]),
    st.sampled_from(["skip", "zero", "propagate"]),
    st.lists(steps, min_size=1, max_size=20),
)
@hypothesis.settings(max_examples=60)
def test_both_implementations_agree(rules, max_norm, nonfinite, script):
    tensors, floats = (Story(twin, rules, max_norm, nonfinite) for twin in TWINS.values())
    for step in script:
        step = {**step, "norms": list(step["norms"])}
        one, other = tensors.step(**step), floats.step(**step)
        for field in Verdict.__slots__:
            torch.testing.assert_close(
                getattr(one, field), getattr(other, field), equal_nan=True, rtol=1e-12, atol=0
            )
        for field in GuardState.__slots__:
            a, b = getattr(tensors.state, field), getattr(floats.state, field)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
