"""Stage 2 in a single process. tests/ranks has the tests with several ranks."""

import torch

from fastguard.stages.contract import Signals
from fastguard.stages.reduce import reduce
from guardtest.stories import stats_of

CPU = torch.device("cpu")


def test_a_single_process_has_nothing_to_reduce():
    stats, signals = stats_of(1.0), Signals.none(CPU)
    assert reduce(stats, signals) == (stats, signals)
