"""A guarded step on a GPU never waits for the device, and runs on any stream."""

import math

import pytest
import torch

import fastguard
from fastguard import AdaGC, AdaptiveLimit, AutoClip, GuardedOptimizer, SpikeRule, Threshold, ZClip

SIZES = [5, 4097, 70_000]
ASLEEP = 400_000_000  # cycles, about 0.2 s; the host needs one or two ms per step


class TwiceTheMean(AdaptiveLimit):
    """A user-defined rule, for which there is no kernel."""

    initial = (0.0,)

    def limit(self, norm, state, step):
        return torch.where(step.seen < 3, math.inf, 2 * state[0])

    def learn(self, norm, state, step):
        return [state[0] + (norm - state[0]) / (step.seen + 1)]


def parameters_of(value=1.0):
    parameters = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in SIZES]
    give(parameters, value)
    return parameters


def give(parameters, value):
    """Assigns new gradients at new addresses."""
    for p in parameters:
        p.grad = torch.full_like(p, value)


def guarded(parameters, **options):
    inner = torch.optim.AdamW(parameters, lr=0.01, fused=True)
    rules = {"grad_norm": SpikeRule(window=16, warmup=4), "loss": Threshold(max=100.0)}
    return GuardedOptimizer(inner, **{"max_norm": 1.0, "spike": rules} | options)


def losses():
    """Returns losses as device tensors, as numbers, as both, and no loss."""
    loss = torch.ones((), device="cuda")
    return {"cuda": loss, "float": 0.5, "both": {"loss": loss, "aux": 0.5}, "none": None}


KINDS = ["cuda", "float", "both", "none"]


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("mode", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait(no_sync, kind, mode, flat):
    parameters, loss = parameters_of(), losses()[kind]
    opt = guarded(parameters, nonfinite=mode, flat_buckets=flat)
    opt.step(loss=loss)  # creates state and tables
    with no_sync():
        for step in range(3):
            if flat:
                opt.zero_grad()
            else:
                give(parameters, float(step))
            opt.step(loss=loss)
            opt.records()
    assert opt.applied_steps == 4


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    "rule", [ZClip(warmup=3), AutoClip(window=8), AdaGC(warmup=3), TwiceTheMean()]
)
def test_a_step_with_an_adaptive_limit_does_not_wait(no_sync, rule, scope):
    parameters = parameters_of()
    opt = guarded(parameters, max_norm=rule, clip_scope=scope, spike=None)
    opt.step()
    with no_sync():
        for step in range(8):
            give(parameters, math.nan if step == 4 else 1.0 + step % 3)
            opt.step()
    assert (opt.applied_steps, opt.skipped_steps) == (8, 1)
    assert opt._state.limits[0].tolist() == [8.0] * (len(SIZES) if scope == "tensor" else 1)
    assert not opt._state.limits.isnan().any()


@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled"])
def test_a_step_with_a_scaler_does_not_wait(no_sync, unscaled):
    parameters = parameters_of()
    opt, scaler = guarded(parameters), torch.amp.GradScaler("cuda", init_scale=1024.0)
    loss = torch.ones((), device="cuda")
    scaler.scale(loss)  # creates its tensors

    def step(value):
        give(parameters, value * 1024.0)
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt, loss=loss)
        scaler.update()

    step(1.0)
    with no_sync():
        step(1.0)
        step(math.inf)
    assert scaler.get_scale() == 512.0
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)
    assert [r.reason for r in opt.flush()] == [None, None, "nonfinite_grad"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_finishes_a_step_before_the_device_begins(kind):
    """This detects copies from pageable memory, which torch's debug mode does not report."""
    parameters, loss = parameters_of(), losses()[kind]
    opt = guarded(parameters)
    for _ in range(2):
        opt.step(loss=loss)
    give(parameters, 2.0)
    opt.max_norm = 0.5
    torch.cuda.synchronize()
    torch.cuda._sleep(ASLEEP)
    awake = torch.cuda.Event()
    awake.record()
    opt.step(loss=loss)
    assert not awake.query(), "the host waited for the device"
    assert opt.flush()[-1].clip_coef == pytest.approx(0.25 / math.sqrt(sum(SIZES)))


def test_a_spike_and_a_nan_are_skipped_without_waiting(no_sync):
    parameters = parameters_of()
    opt = guarded(parameters, max_norm=None)
    loss = torch.ones((), device="cuda")
    values = [1.0, 1.1, 0.9, 1.0, 1.0, 500.0, math.nan, 1.0]
    opt.step(loss=loss)
    with no_sync():
        for value in values[1:]:
            give(parameters, value)
            opt.step(loss=loss)
    actions = [r.action for r in opt.flush()]
    assert actions == ["applied"] * 5 + ["skipped"] * 2 + ["applied"]
    assert all(p.isfinite().all() for p in parameters)


def asleep():
    """A stream that is busy for a while, so that work queued on it runs late."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(ASLEEP)
    return stream


def test_numbers_uploaded_on_a_late_stream_are_awaited_or_uploaded_again():
    """Limits and rules are cached; another stream must not read them before their upload."""
    parameters = [parameters_of(100.0) for _ in range(4)]
    rule = {"grad_norm": Threshold(max=17.25)}
    opts = [guarded(p, max_norm=None, spike=rule) for p in parameters[:2]]
    fastguard.clip_grad_norm_(parameters[2], 1.0)  # compiles the kernels
    give(parameters[2], 100.0)
    guarded(parameters_of(), max_norm=None, spike={"grad_norm": Threshold(max=1e9)}).step()
    torch.cuda.synchronize()
    late, early = asleep(), torch.cuda.Stream()
    with torch.cuda.stream(late):
        fastguard.clip_grad_norm_(parameters[2], 0.625)
        opts[0].step()
    with torch.cuda.stream(early):
        fastguard.clip_grad_norm_(parameters[3], 0.625)
        opts[1].step()
    torch.cuda.synchronize()
    for clipped in parameters[2:]:
        norm = torch.cat([p.grad for p in clipped]).double().norm()
        assert norm.item() == pytest.approx(0.625, rel=1e-5)
    assert [opt.skipped_steps for opt in opts] == [1, 1]


def test_alternating_streams_give_the_results_of_one_stream():
    torch.manual_seed(1)
    gradients = [[torch.randn(n, device="cuda") for n in SIZES] for _ in range(6)]
    gradients[3][1][7] = math.nan
    results = []
    for n_streams in (1, 3):
        streams = [torch.cuda.Stream() for _ in range(n_streams)]
        parameters = parameters_of()
        opt = guarded(parameters)
        torch.cuda.synchronize()
        for step, given in enumerate(gradients):
            before, stream = streams[(step - 1) % n_streams], streams[step % n_streams]
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for p, g in zip(parameters, given, strict=True):
                    p.grad = g.clone()
                opt.step(loss=1.0 + step)
        torch.cuda.synchronize()
        results.append((opt.flush(), [p.detach() for p in parameters]))
    (records, weights), (others, more) = results
    assert records == others and records[3].culprits[0][1:] == (1, 0, 0)
    assert all(map(torch.equal, weights, more))
