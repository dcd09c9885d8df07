"""All contenders compute the same result, on gradients of a few kilobytes."""

import pytest
import torch

from fastguard.commands.bench import Workload
from fastguard.commands.bench.contenders import CONTENDERS, PEERS_ON_CUDA, Unavailable
from fastguard.commands.bench.runner import prepare, relative_error
from fastguard.commands.bench.steps import STEPS
from guardtest.bench import CPU, ON_CPU, a_case


@pytest.mark.parametrize("situation", ["nothing to clip", "clipping"])
@pytest.mark.parametrize("contender", ON_CPU)
def test_every_contender_computes_the_same_gradients_and_norm_as_torch(contender, situation):
    work = Workload(a_case(situation=situation), CPU)
    expected = [g.clone() for g in work.grads]
    coef = min(1.0, work.max_norm / (work.true_norm + 1e-6))
    prepared = CONTENDERS[contender](work)
    norm = prepared.call()
    assert relative_error(norm, work.true_norm) < 1e-6
    for p, before in zip(prepared.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, before * coef, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("contender", ["torch foreach", "fastguard", "fastguard flat"])
def test_zero_mode_and_its_peer_clean_all_gradients(contender):
    work = Workload(a_case(situation="one NaN, zeroed"), CPU)
    dirty = sum(int(g.isnan().sum()) for g in work.grads)
    prepared = CONTENDERS[contender](work)
    norm = prepared.call()
    assert dirty == 1
    assert relative_error(norm, work.true_norm) < 1e-6
    assert all(p.grad.isfinite().all() for p in prepared.parameters)


@pytest.mark.parametrize("optimizer", [("AdamW", "fused"), ("SGD", "foreach")])
@pytest.mark.parametrize("situation", ["nothing to clip", "clipping", "one NaN, skipped"])
def test_every_step_leaves_finite_weights_and_can_be_repeated(optimizer, situation):
    case = a_case(
        contenders=tuple(STEPS), baseline="bare step", optimizer=optimizer, situation=situation
    )
    with torch.no_grad():
        work = Workload(case, CPU)
        field, left_out = prepare(work)
        for name, prepared in field.items():
            for _ in range(3):
                prepared.call()
                prepared.restore()
            assert all(p.isfinite().all() for p in prepared.parameters), name
    assert set(left_out) == ({"bare step", "clip + step"} if "NaN" in situation else set())


def test_changed_gradients_are_restored():
    work = Workload(a_case(situation="clipping"), CPU)
    before = [g.clone() for g in work.grads]
    for name in ("torch foreach", "fastguard", "fastguard flat"):
        prepared = CONTENDERS[name](work)
        prepared.call()
        assert not torch.equal(prepared.parameters[0].grad, before[0])
        prepared.restore()
        for p, g in zip(prepared.parameters, before, strict=True):
            assert torch.equal(p.grad, g)


@pytest.mark.parametrize("name", PEERS_ON_CUDA)
def test_gpu_peers_explain_why_they_are_left_out(name):
    with pytest.raises(Unavailable, match="CUDA"):
        CONTENDERS[name](Workload(a_case(), CPU))
