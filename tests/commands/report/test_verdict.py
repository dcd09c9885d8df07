"""The verdict on a run: every sentence follows from the records."""

import math

import numpy as np
import pytest

from fastguard import StepRecord
from fastguard.commands.report.summary import summarize
from fastguard.commands.report.verdict import judge
from fastguard.records.read_json_lines import Block

NAN = math.nan
STEPS = 12_000
NOISE = np.exp(np.random.default_rng(0).normal(0, 0.3, STEPS + 1)).tolist()


def record(step, action="applied", **more):
    more = {"norm": NOISE[step % STEPS], "coef": 1.0, "lr": 1e-3, "losses": {"loss": 1.0}} | more
    norm, coef = more.pop("norm"), more.pop("coef")
    return StepRecord(step, norm, coef, action, **more).as_dict()


def bad(step, reason="nonfinite_grad", action="skipped", *, culprits=(), **more):
    return record(
        step,
        action,
        reason=reason,
        culprits=culprits,
        n_culprits=more.pop("n_culprits", len(culprits)),
        **more,
    )


def verdict_on(records, damaged=0):
    return judge(summarize([Block(records, damaged, 0)]))


def run(special, steps=STEPS, **more):
    """A run in which the steps of `special` (step -> record) differ from the others."""
    return [special.get(step) or record(step, **more) for step in range(1, steps + 1)]


def findings_with(verdict, text):
    return [finding for finding in verdict.findings if text in finding]


def cause_of(*bad_steps, steps=3000):
    (cause,) = findings_with(verdict_on(run({b["step"]: b for b in bad_steps}, steps)), "ause")
    return cause


def test_a_run_without_incidents():
    verdict = verdict_on(run({}))
    assert verdict.headline == "No incident in 12,000 steps."
    assert (verdict.findings, verdict.survived) == ([], True)


def test_three_incidents_and_a_rising_norm():
    rise = {
        step: record(step, norm=NOISE[step] * (1 + (step - 9400) / 1300))
        for step in range(9400, STEPS + 1)
    }
    culprits = (("head.weight", 1, 0, 0),)
    incidents = {step: bad(step, culprits=culprits) for step in (100, 5000, 9000)}
    verdict = verdict_on(run(rise | incidents))
    assert verdict.headline == "3 incidents in 12,000 steps, all survived."
    assert verdict.survived
    (rising,) = findings_with(verdict, "rising")
    since = int(rising.partition("step ")[2].partition(":")[0].replace(",", ""))
    assert (
        rising.startswith("Gradient norm has been rising since about step")
        and abs(since - 9400) < 400
    )
    (cause,) = findings_with(verdict, "cause")
    assert cause.startswith("Likely cause (3 of 3 incidents): the backward pass of head:")


def test_a_single_incident_is_worded_in_the_singular():
    assert verdict_on(run({5: bad(5)}, 10)).headline == "1 incident in 10 steps, survived."


def test_a_run_that_never_recovered():
    records = run({}, 500) + [bad(step, losses={"loss": NAN}) for step in range(501, 801)]
    verdict = verdict_on(records)
    assert not verdict.survived
    assert verdict.headline == (
        "1 incident in 800 steps; the last one was not over when the records ended."
    )
    assert verdict.findings[0] == (
        "No step since 501 was good (300 steps, nonfinite_grad), and all of these steps were "
        "skipped: weights and optimizer state are the same as before step 501. If the batches are "
        "fine, the weights were already bad; check a checkpoint with `fastguard ckpt verify`."
    )
    assert not any("usable" in finding for finding in verdict.findings)


def test_bad_steps_that_reached_the_weights_are_reported():
    records = run({}, 50) + [record(s, losses={"loss": NAN}) for s in range(51, 60)]
    verdict = verdict_on(records)
    assert "9 of them reached the weights" in verdict.findings[0]
    assert "Go back to a checkpoint from before step 51." in verdict.findings[0]
    assert not verdict.survived


def test_a_single_bad_last_step_is_reported_as_such():
    verdict = verdict_on(run({50: bad(50)}, 50))
    assert verdict.findings[0] == ("The last step, 50, was bad (nonfinite_grad).")


def test_a_recurring_batch_is_a_cause():
    culprits = (("a.w", 1, 0, 0), ("b.w", 1, 0, 0))
    steps = [bad(s, culprits=culprits, tag=(s // 1000, 46)) for s in (46, 1046, 2046)]
    assert "(3 of 3 incidents): the data: batch 46 was used each time" in cause_of(*steps)
    steps = [bad(s, culprits=culprits, tag={"epoch": s // 1000, "batch": 46}) for s in (46, 1046)]
    assert "(2 of 2 incidents): the data: batch 46 was used" in cause_of(*steps)
    steps = [bad(s, culprits=culprits, tag="shard-7") for s in (46, 1046)]
    assert "(2 of 2 incidents): the data: tag shard-7" in cause_of(*steps)


def test_a_part_of_the_loss_is_a_cause():
    steps = [bad(s, "nonfinite_loss", losses={"seg": 1.0, "contour": NAN}) for s in (10, 900)]
    assert "the loss part “contour”" in cause_of(*steps)
    both = [bad(s, "nonfinite_loss", losses={"seg": NAN, "contour": NAN}) for s in (10, 900)]
    assert "the forward pass" in cause_of(*both)


def test_the_pass_and_the_layer_are_causes():
    def at(*culprits, **more):
        return cause_of(*(bad(s, culprits=culprits, **more) for s in (10, 900)))

    assert "backward pass of blocks.3.qkv:" in at(("blocks.3.qkv.weight", 1, 0, 0))
    several = (("a.w", 1, 0, 0), ("b.w", 0, 3, 0))
    assert "the backward pass: gradients contained NaN" in at(*several)
    # Only eight culprits are named, so the layers of the others are unknown.
    assert "the backward pass: gradients contained NaN" in at(("a.w", 1, 0, 0), n_culprits=12)
    assert "an overflow" in at(("a.w", 0, 1, 0), ("b.w", 0, 0, 2))
    assert "an overflow" in at()  # found only by the scaler


def test_spikes_have_three_causes():
    def spikes(*steps):
        return [bad(s, "grad_spike", spikes=("grad_norm",), norm=90.0) for s in steps]

    assert "single batches" in cause_of(*spikes(400, 900))
    rise = {s: record(s, norm=NOISE[s] * (1 + (s - 6000) / 1000)) for s in range(6000, STEPS + 1)}
    verdict = verdict_on(run(rise | {s["step"]: s for s in spikes(7000, 9000)}))
    assert findings_with(verdict, "a learning rate that is too high: there are spikes")
    warmup = run({s["step"]: s for s in spikes(100, 200)}, 3000)
    for row in warmup:
        row["lr"] = 1e-3 * min(1, row["step"] / 300)
    assert findings_with(verdict_on(warmup), "before the learning rate peaked at step 300")


def test_a_cause_must_explain_half_of_the_incidents():
    steps = [
        bad(10, culprits=(("a.w", 1, 0, 0),), tag=1),
        bad(20, culprits=(("a.w", 0, 1, 0), ("b.w", 0, 1, 0)), tag=2),
        bad(30, "nonfinite_loss", losses={"loss": NAN}, tag=3),
        bad(40, "grad_spike", spikes=("grad_norm",), tag=4),
        bad(50, "loss_spike", spikes=("loss",), losses={"loss": 9.0}, tag=5),
    ]
    assert cause_of(*steps).startswith("No cause stands out")


def test_clipping_most_steps_is_reported():
    records = [record(s, "clipped" if s % 4 else "applied", coef=0.5) for s in range(1, 401)]
    assert findings_with(verdict_on(records), "75% of the steps were clipped")
    records = [record(s, "applied" if s % 4 else "clipped") for s in range(1, 401)]
    assert not findings_with(verdict_on(records), "clipped")


def test_a_vanished_learning_rate_is_reported():
    records = [record(s, lr=1e-3 if s < 300 else 8.88e-21) for s in range(1, 1001)]
    (finding,) = findings_with(verdict_on(records), "learning rate")
    assert "8.88e-21" in finding and "since about step 300" in finding
    ends_at_zero = [record(s, lr=1e-3 * (1 - s / 1000)) for s in range(1, 1001)]
    assert not findings_with(verdict_on(ends_at_zero), "learning rate")
    always = verdict_on([record(s, lr=0.0) for s in range(1, 100)])
    assert findings_with(always, "The learning rate is 0 at every step: nothing is learned.")


def test_a_rising_loss_is_reported_by_name():
    records = [
        record(s, losses={"seg": 2.0 + 0.01 * NOISE[s] + max(0, s - 800) / 100})
        for s in range(1, 1001)
    ]
    assert findings_with(verdict_on(records), "Loss “seg” has been rising since about step")


def test_signals_of_a_batch_check_are_not_rising_losses():
    records = [
        record(s, losses={"loss": 1.0, "batch.inputs": float(s > 800 and s % 3 == 0)})
        for s in range(1, 1001)
    ]
    assert not findings_with(verdict_on(records), "rising")


@pytest.mark.parametrize("times, text", [(1, "once, from 100"), (3, "3 times, first from 100")])
def test_a_step_number_that_goes_back_is_reported(times, text):
    records = [record(s) for _ in range(times + 1) for s in range(1, 101)]
    assert findings_with(verdict_on(records), f"went back {text} to 1")


@pytest.mark.parametrize(
    "n, text",
    [
        (1, "1 line could not be read and was left out."),
        (1234, "1,234 lines could not be read and were left out."),
    ],
)
def test_damaged_lines_are_reported(n, text):
    assert verdict_on(run({}, 10), damaged=n).findings == [text]


def test_a_run_without_records_has_a_verdict():
    verdict = verdict_on([], damaged=3)
    assert verdict.headline == "No record was found."
    assert findings_with(verdict, "3 lines")


@pytest.mark.parametrize("n", [1, 16])
def test_a_loss_scale_search_is_reported_but_not_an_incident(n):
    searches = {s: bad(s, "loss_scale", culprits=[("w", 0, 3, 0)]) for s in range(1, n + 1)}
    verdict = verdict_on(run(searches, 3000))
    assert verdict.headline == "No incident in 3,000 steps."
    (finding,) = findings_with(verdict, "loss scale")
    assert finding.startswith("1 step was" if n == 1 else "16 steps were")
    assert not findings_with(verdict_on(run({}, 3000)), "loss scale")
