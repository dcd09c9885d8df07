"""The records of steps: numbers, names, log lines, and bounded memory."""

import copy
import dataclasses
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

from fastguard import GuardedOptimizer, SpikeRule, StepRecord, Threshold
from fastguard.records.device_row import ROWS, Outcome
from fastguard.records.recorder import BATCH, KEPT, Recorder
from fastguard.records.unfinished import Settled
from fastguard.stages.agc import UnitSummary
from fastguard.stages.contract import GuardState, Policy, Signals
from fastguard.stages.decide import decide
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reason import Reason
from guardtest.recorded import SlowArrival, guard

NAN, INF = math.nan, math.inf
RULES = {"grad_norm": SpikeRule(window=4, warmup=2, sigma=3.0), "ce": Threshold(max=5.0)}


# Contents of records.


@pytest.mark.parametrize("action", ["applied", "clipped", "sanitized", "skipped"])
def test_every_reason_is_an_incident_except_a_search_for_a_loss_scale(action):
    reasons = {reason.label: reason.is_incident for reason in Reason if reason}
    assert [label for label, is_incident in reasons.items() if not is_incident] == ["loss_scale"]
    for reason, is_incident in reasons.items():
        assert StepRecord(1, 2.0, 1.0, action, reason).is_incident == is_incident
    assert StepRecord(1, 2.0, 1.0, action).is_incident == (action == "skipped")


def test_a_step_without_an_incident():
    _, opt = guard(max_norm=10.0)
    opt.step(loss={"ce": torch.tensor(1.5)}, tag=("epoch", 3))
    assert opt.records() == [
        StepRecord(
            step=1,
            total_norm=2.0,
            clip_coef=1.0,
            action="applied",
            losses={"ce": 1.5},
            lr=0.5,
            tag=("epoch", 3),
            limit=10.0,
        )
    ]


def test_actions_and_reasons():
    (p,), opt = guard(max_norm=10.0, spike=RULES, nonfinite="skip")
    script = [
        ([1.0] * 4, 1.0, "applied", None),
        ([1.0] * 4, NAN, "skipped", "nonfinite_loss"),
        ([NAN] * 4, NAN, "skipped", "nonfinite_grad"),
        ([1.1] * 4, 1.0, "applied", None),
        ([100.0] * 4, 9.0, "skipped", "grad_spike"),
        ([1.0] * 4, 9.0, "skipped", "loss_spike"),
    ]
    for grad, loss, _, _ in script:
        p.grad = torch.tensor(grad)
        opt.step(loss={"ce": loss})
    records = opt.records()
    assert [(r.action, r.reason) for r in records] == [s[2:] for s in script]
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r.consecutive_skips for r in records] == [0, 1, 2, 0, 1, 2]
    assert records[4].spikes == ("grad_norm", "ce")
    assert records[5].spikes == ("ce",)


def test_the_first_eight_culprits_are_named_and_all_are_counted():
    parameters, opt = guard(n=20)
    for i, p in enumerate(parameters):
        if i >= 5:
            p.grad[:3] = torch.tensor([NAN, INF, -INF])
    opt.step()
    (record,) = opt.records()
    assert [c[0] for c in record.culprits] == [f"layer.{i}.weight" for i in range(5, 13)]
    assert all(c[1:] == (1, 1, 1) for c in record.culprits)
    assert record.n_culprits == 15
    assert (record.nan, record.posinf, record.neginf) == (15, 15, 15)
    assert record.total_norm == pytest.approx(math.sqrt(5 * 4 + 15))
    assert "layer.12.weight (1 NaN, 1 +Inf, 1 -Inf) and 7 more" in str(record)
    assert "layer.13" not in str(record)


@pytest.mark.parametrize(
    ("scope", "expected"), [("global", 1 / math.sqrt(104)), ("tensor", 0.1), ("group", 0.1)]
)
def test_clip_coef_is_the_smallest_of_the_segments(scope, expected):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p]} for p in parameters]
    opt = GuardedOptimizer(torch.optim.SGD(groups, lr=1.0), max_norm=1.0, clip_scope=scope)
    parameters[0].grad = torch.tensor([2.0])
    parameters[1].grad = torch.tensor([10.0])
    opt.step()
    assert opt.records()[0].clip_coef == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
def test_the_learning_rate_is_the_current_one_of_the_first_group(lr):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": lr}, {"params": parameters[1:], "lr": 9.0}]
    opt = GuardedOptimizer(torch.optim.AdamW(groups, foreach=False))
    opt.step()
    opt.param_groups[0]["lr"] = lr * 2
    opt.step()
    assert [r.lr for r in opt.records()] == [0.25, 0.5]


def test_a_record_is_one_line_whatever_the_tag():
    record = StepRecord(
        step=7,
        total_norm=1.0,
        clip_coef=0.5,
        action="skipped",
        reason="loss_spike",
        losses={"ce": 9.0, "aux": NAN},
        spikes=("ce",),
        thresholds={"ce": 5.0},
        consecutive_skips=3,
        lr=1e-3,
        tag=torch.zeros(2, 2),
    )
    assert str(record) == (
        "step 7 skipped (tag tensor([[0., 0.], [0., 0.]])) because of loss_spike: aux=nan; "
        "ce=9 > 5; norm 1, clip_coef 0.5, lr 0.001 (3 skips in a row)"
    )


def test_a_nan_coefficient_is_not_reported_as_applied():
    """`nan < 1` is False, so the comparison must be `>=`."""
    (p,), opt = guard(max_norm=1.0, nonfinite="propagate")
    p.grad[0] = NAN
    opt.step()
    (record,) = opt.records()
    assert record.action == "clipped"
    assert math.isnan(record.clip_coef)
    assert "clip_coef nan" in str(record)


# Delivery of records.


def test_records_are_handed_out_once():
    _, opt = guard()
    opt.step()
    opt.step()
    assert len(opt.records()) == 2
    assert opt.records() == []
    opt.step()
    assert [r.step for r in opt.flush()] == [3]


def test_the_history_can_be_read_repeatedly():
    _, opt = guard()
    for n in (1, 2, 3):
        opt.step()
        assert [r.step for r in opt.history] == list(range(1, n + 1))
    opt.history.clear()  # a copy
    assert [r.step for r in opt.records()] == [1, 2, 3]
    assert opt.records() == []
    opt.step()
    assert [r.step for r in opt.history] == [1, 2, 3, 4]
    assert [r.step for r in opt.records()] == [4]
    assert [r.step for r in copy.deepcopy(opt).history] == [1, 2, 3, 4]
    assert opt.history[-1] is opt.history[-1]


def test_memory_is_bounded_if_records_are_never_fetched(monkeypatch):
    recorder = Recorder()
    for step in range(KEPT + 10):
        recorder._finish(StepRecord(step, 1.0, 1.0, "applied"))
    records = recorder.drain()
    assert len(records) == KEPT
    assert records[0].step == 10
    assert recorder.drain() == []
    assert (len(recorder.history), recorder.history[0].step) == (KEPT, 10)


def test_a_record_holds_no_tensor():
    (p,), opt = guard(spike=RULES)
    p.grad[0] = NAN
    opt.step(loss={"ce": torch.tensor(2.0)})
    (record,) = opt.records()

    def plain(value):
        if isinstance(value, dict):
            return all(map(plain, value.values()))
        if isinstance(value, tuple):
            return all(map(plain, value))
        return value is None or type(value) in (int, float, str)

    assert all(plain(getattr(record, name)) for name in StepRecord.__slots__)


# Records of steps without an incident are made later, in batches.


def test_records_come_in_order_whenever_they_are_fetched():
    (p,), opt = guard(max_norm=10.0)
    fetched = []
    for i in range(3 * ROWS):
        p.grad = torch.full((4,), NAN if i % 50 == 7 else 1.0)
        opt.step(tag=i)
        if i % 90 == 0:
            fetched += opt.records()
    fetched += opt.records()
    assert [r.step for r in fetched] == list(range(1, 3 * ROWS + 1))
    assert [r.tag for r in fetched] == list(range(3 * ROWS))
    assert [r.tag for r in fetched if r.reason] == list(range(7, 3 * ROWS, 50))


def test_a_record_has_the_settings_of_its_step():
    (p,), opt = guard(max_norm=10.0)
    lr = opt.param_groups[0]["lr"] = torch.tensor(0.5)
    losses = {"ce": torch.tensor(1.5)}
    opt.step(loss=losses)
    lr.fill_(0.25)
    losses["ce"].fill_(9.0)
    p.grad.fill_(3.0)
    opt.last.total_norm.fill_(7.0)
    opt.step(loss=losses)
    first, second = opt.records()
    assert (first.total_norm, first.lr, first.losses) == (2.0, 0.5, {"ce": 1.5})
    assert (second.total_norm, second.lr, second.losses) == (6.0, 0.25, {"ce": 9.0})


def test_a_sink_gets_every_record_from_when_it_was_added():
    _, opt = guard()
    opt.step()
    told = []
    opt.add_sink(told.append)
    assert told == []
    opt.step()
    assert [r.step for r in told] == [2]
    assert [r.step for r in opt.records()] == [1, 2]


def test_few_records_wait_to_be_made():
    _, opt = guard()
    for _ in range(5 * ROWS + 3):
        opt.step()
        assert len(opt._recorder._pending) < ROWS


# Records sent through the ring, as on a GPU.


def outcomes(counts, mode="skip", steps=3, losses=(9.0, NAN), **options):
    """Returns the outcomes of successive steps with these counts."""
    n_tensors = counts.shape[1]
    summary = torch.cat([torch.tensor([4.0]), counts.sum(1)]).double()[:, None]
    stats = GradStats(summary, counts, 2.0, [f"w{i}" for i in range(n_tensors)])
    policy = Policy(
        torch.tensor([0.5], dtype=torch.float64), mode, tuple(RULES.values()), tuple(RULES)
    )
    state = GuardState.fresh(policy, torch.device("cpu"))
    signals = Signals(torch.tensor(losses, dtype=torch.float64), ("ce", "aux"))
    for _ in range(steps):
        verdict = decide(stats, signals, state, policy)
        yield Outcome(stats, signals, verdict, state, policy.signals, **options)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=type)
@pytest.mark.parametrize("n_tensors", [1, 3, 12])
@pytest.mark.parametrize("mode", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("bad", ["none", "some", "all"])
def test_a_record_sent_through_the_ring_equals_that_of_a_cpu(n_tensors, mode, bad, lr):
    counts = torch.zeros(3, n_tensors, dtype=torch.int64)
    if bad == "some":
        counts[:, n_tensors // 2] = torch.tensor([2, 0, 1])
    elif bad == "all":
        counts += torch.arange(1, n_tensors + 1) * 3
    recorder = Recorder()
    for outcome in outcomes(counts, mode, lr=lr, tag="tag"):
        recorder.send(outcome)
        assert repr(recorder.wait()) == repr(Settled.of(outcome).record())


def test_the_most_clipped_unit_goes_through_the_ring():
    """Kernels number units per tensor, and other backends over all tensors."""
    f64 = torch.float64
    summaries = (
        UnitSummary(torch.tensor([0.5, 3.0, 0.0, 4.0], dtype=f64), [0, 3], [3, 4]),
        UnitSummary(torch.tensor([0.25, 1.0, 2.0, 1.0], dtype=f64), [1, 2, 4], [2, 1, 7]),
    )
    recorder = Recorder()
    for n, skipped, expected in (
        (1, False, (3, 7, ("w3", 1))),
        (2, False, (4, 17, ("w4", 1))),
        (2, True, (0, 0, None)),
    ):
        (outcome,) = outcomes(torch.zeros(3, 5, dtype=torch.int64), steps=1)
        verdict = dataclasses.replace(
            outcome.verdict,
            found_inf=torch.tensor(float(skipped)),
            known=outcome.verdict.known._replace(skipped=skipped),
            clipped_units=summaries[:n],
        )
        limit = torch.tensor(7.0, dtype=f64)
        outcome = dataclasses.replace(outcome, limit=limit, verdict=verdict)
        recorder.send(outcome)
        record = recorder.wait()
        assert repr(record) == repr(Settled.of(outcome).record())
        found = record.clipped_units, record.limited_units, record.most_clipped_unit
        assert found == expected and record.limit == 7.0


def test_the_ring_wraps_without_losing_a_record():
    recorder = Recorder()
    for outcome in outcomes(torch.zeros(3, 1, dtype=torch.int64), steps=2 * ROWS + 3):
        recorder.send(outcome)
    assert [r.step for r in recorder.drain()] == list(range(1, 2 * ROWS + 4))


def test_records_without_an_incident_are_made_in_batches():
    recorder = Recorder()
    none = torch.zeros(3, 1, dtype=torch.int64)
    steps = outcomes(none, steps=BATCH + 1, losses=(1.0, 1.0))
    for number, outcome in enumerate(steps, 1):
        recorder.send(outcome)
        assert (recorder.last is None) == (number <= BATCH)
    assert recorder.last.step == BATCH and recorder.last.reason is None
    assert [r.step for r in recorder.drain()] == list(range(1, BATCH + 2))


def test_an_incident_is_logged_in_the_first_step_after_its_record_has_arrived(caplog):
    recorder = Recorder()
    good = outcomes(torch.zeros(3, 1, dtype=torch.int64), steps=2, losses=(1.0, 1.0))
    (bad,) = outcomes(torch.ones(3, 1, dtype=torch.int64), steps=1)
    for outcome in (next(good), bad):
        recorder.send(outcome)
        assert not caplog.text
    recorder.send(next(good))
    assert "skipped because of nonfinite_grad" in caplog.text


def test_a_record_that_was_not_made_yet_keeps_no_gradients_or_counts():
    recorder, counts = Recorder(), torch.zeros(3, 1, dtype=torch.int64)
    recorder.send(*outcomes(counts, steps=1, losses=(1.0, 1.0)))
    kept, counts = weakref.ref(counts), None
    gc.collect()
    assert len(recorder._pending) == 1 and kept() is None


def test_records_stay_in_order_when_a_model_moves_back_from_a_device():
    recorder, seen = Recorder(), []
    steps = outcomes(torch.zeros(3, 1, dtype=torch.int64), steps=4)
    recorder.send(next(steps))
    recorder.add(next(steps))
    recorder.send(next(steps))
    recorder.sinks.append(seen.append)
    recorder.add(next(steps))
    assert [r.step for r in recorder.drain()] == [1, 2, 3, 4]
    assert [r.step for r in seen] == [3, 4] and recorder.last.step == 4


def test_a_step_with_more_losses_than_the_ring_has_space_for():
    recorder = Recorder()
    first, second, third = outcomes(torch.zeros(3, 1, dtype=torch.int64), steps=3)
    losses = torch.arange(5, dtype=torch.float64)
    many = dataclasses.replace(second, signals=Signals(losses, tuple("abcde")))
    for outcome in (first, many, third):
        recorder.send(outcome)
    recorder.wait()
    assert [len(r.losses) for r in recorder.drain()] == [2, 5, 2]


def test_unfinished_records_are_waited_for_only_on_request():
    record, arrival = StepRecord(1, 1.0, 1.0, "applied"), SlowArrival()
    recorder = Recorder()
    recorder._pending.append(SimpleNamespace(key=object(), arrival=arrival, record=lambda: record))
    assert recorder.drain() == []
    assert not arrival.waited
    assert recorder.wait() is record
    assert recorder.drain() == [record]


def test_a_device_that_falls_a_whole_ring_behind_is_waited_for():
    recorder, arrivals = Recorder(), []
    (outcome,) = outcomes(torch.zeros(3, 1, dtype=torch.int64), steps=1)
    for i in range(ROWS):
        arrivals.append(SlowArrival())
        record = StepRecord(i, 1.0, 1.0, "applied")
        recorder._pending.append(
            SimpleNamespace(key=object(), arrival=arrivals[-1], record=lambda record=record: record)
        )
    recorder.send(outcome)
    assert [a.waited for a in arrivals] == [1] + [0] * (ROWS - 1)
    assert [r.step for r in recorder.drain()] == [0]


def test_clearing_the_last_record_keeps_unfetched_ones():
    recorder = Recorder()
    recorder._finish(StepRecord(1, 1.0, 1.0, "skipped", consecutive_skips=9))
    recorder.forget_last()
    assert recorder.wait() is None
    assert len(recorder.drain()) == 1


def test_records_survive_a_copy_of_the_optimizer():
    _, opt = guard()
    opt.step(tag=1)
    twin = copy.deepcopy(opt)
    assert [r.tag for r in twin.records()] == [1]
    assert [r.tag for r in opt.records()] == [1]
