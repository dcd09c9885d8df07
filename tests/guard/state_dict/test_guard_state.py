"""The guard's part of a state dict. (tests/guard/test_state_dict.py resumes whole runs.)"""

import io
import warnings

import pytest
import torch

from fastguard import SpikeRule, Threshold
from fastguard.guard.state_dict.guard_state import load, save
from fastguard.stages.contract import GuardState, Policy

CPU = torch.device("cpu")
NAN = float("nan")


def policy(*rules, signals=("grad_norm", "loss", "aux")):
    return Policy(torch.ones(1, dtype=torch.float64), "skip", rules, signals[: len(rules)])


RULES = (SpikeRule(window=5, warmup=2), Threshold(max=3.0), SpikeRule(window=3, warmup=2))


def filled(of):
    state = GuardState.fresh(of, CPU)
    state.counters.copy_(torch.tensor([9, 6, 3, 1, 0]))
    state.windows.normal_()
    rings = [(3, 3, 1), (0, 0, 4), (3, 1, 0)]
    for row, ring in zip(state.rings, rings, strict=False):
        row.copy_(torch.tensor(ring))
    return state


def rings(*rows):
    """Returns the ring buffers of three rules; missing rows are empty."""
    return torch.tensor([*rows, *[(0, 0, 0)] * (3 - len(rows))])


@pytest.mark.parametrize("rules", [(), RULES[:1], RULES], ids=["none", "one", "three"])
def test_a_saved_state_loads_with_weights_only(rules):
    of = policy(*rules)
    state = filled(of)
    buffer = io.BytesIO()
    torch.save(save(state, of), buffer)
    buffer.seek(0)
    back = load(torch.load(buffer, weights_only=True), of, CPU)
    for name in ("counters", "windows", "rings"):
        assert torch.equal(getattr(back, name), getattr(state, name))


def test_saved_and_loaded_tensors_are_copies():
    of = policy(*RULES)
    state = filled(of)
    saved = save(state, of)
    back = load(saved, of, CPU)
    state.counters.zero_()
    back.windows.zero_()
    assert saved["counters"].tolist() == [9, 6, 3, 1, 0]
    assert saved["windows"].any()


def test_sigma_warmup_and_action_may_change_on_resume():
    """These settings are not part of the baseline."""
    before = policy(SpikeRule(window=5, warmup=2))
    after = policy(SpikeRule(window=5, warmup=3, sigma=9.0, action="record"))
    state = filled(before)
    assert torch.equal(load(save(state, before), after, CPU).windows, state.windows)


def test_a_state_saved_before_loss_scale_skips_were_counted():
    of = policy(*RULES)
    saved = save(filled(of), of)
    saved["counters"] = torch.tensor([9, 6, 3, 1])
    assert load(saved, of, CPU).counters.tolist() == [9, 6, 3, 1, 0]


def test_without_a_saved_state_a_new_one_starts_with_one_warning():
    of = policy(*RULES)
    with pytest.warns(UserWarning, match="the guard starts with counters at 0") as caught:
        state = load(None, of, CPU)
    assert len(caught) == 1
    assert not state.counters.any()


def test_loading_a_guard_does_not_warn():
    of = policy(*RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(save(filled(of), of), of, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, but this release reads 1"),
        ({"version": None}, "version None"),
        ({"signals": ["grad_norm", "loss", "other"]}, "construct the guard with the same spike="),
        ({"windows_of": [5, 0, 4]}, r"windows \[5, 0, 4\]"),
        ({"counters": torch.zeros(6)}, r"counters of shape \(6,\), expected \(5,\)"),
        ({"rings": "damaged"}, "rings of shape None"),
        ({"windows": torch.zeros(3, 4)}, "windows of shape"),
        ({"signals": None}, "spike rules None"),
        ({"windows_of": 5}, "with windows 5"),
        (
            {"counters": torch.tensor([9.0, 6.0, NAN, 1.0, 0.0])},
            "counters of torch.float32, expected",
        ),
        ({"windows": torch.zeros(3, 5)}, "windows of torch.float32, expected torch.float64"),
        (
            {"counters": torch.tensor([9, 6, -3, 1, 0])},
            r"counters=\[9, 6, -3, 1, 0\].*damaged; delete",
        ),
        ({"rings": rings((5, 99, 0))}, r"rings=\[\[5, 99, 0\]"),
        ({"rings": rings((6, 0, 0))}, r"rings=\[\[6, 0, 0\]"),
        ({"rings": rings((5, 5, 0))}, r"rings=\[\[5, 5, 0\]"),
        ({"rings": rings((-1, 0, 0))}, "damaged"),
        ({"rings": rings((5, 0, -1))}, "damaged"),
        ({"rings": rings((5, 0, 0), (1, 0, 0))}, "damaged"),
        ({"windows": torch.full((3, 5), NAN, dtype=torch.float64)}, "windows.*damaged"),
    ],
)
def test_an_invalid_state_is_refused(change, message):
    of = policy(*RULES)
    with pytest.raises(ValueError, match=message):
        load({**save(filled(of), of), **change}, of, CPU)


@pytest.mark.parametrize(
    "key", ["version", "signals", "windows_of", "counters", "windows", "rings"]
)
def test_a_missing_entry_is_named(key):
    of = policy(*RULES)
    saved = save(filled(of), of)
    del saved[key]
    with pytest.raises(ValueError, match=key):
        load(saved, of, CPU)
