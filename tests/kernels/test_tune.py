"""All launch parameters that benchmarks/tune.py tries give the same sums."""

import pytest
import torch

from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from guardtest.bench import benchmarks
from guardtest.tolerances import MEASURED_RTOL

tune = benchmarks("tune")


@pytest.mark.parametrize("one", tune.TRIES, ids=lambda one: one.name)
def test_each_trial_gives_the_same_sums(one):
    grads = [torch.randn(n) for n in (70_001, 9, 33_000)]
    summary, counts = tune.reader(grads, one, torch.device("cpu"))()
    want, _ = reference.measure_bucket(bucketize(grads).buckets[0], 1, 3, 2.0)
    torch.testing.assert_close(summary, want, rtol=2 * MEASURED_RTOL, atol=0)
    assert not counts.any()


def test_rows_have_the_format_of_a_lab_table():
    spread = {"p20": 0.9, "p50": 0.95, "p80": 1.0}
    row = {"try": "a", "dtype": "float32", "expected": "1", "ratio": spread, "limit_percent": 93.21}
    assert tune.lab_rows([row], "A Card")[1] == (
        "| a | float32 | 1 | 0.950 [0.900..1.000] | 93.2 % | A Card |"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().out
