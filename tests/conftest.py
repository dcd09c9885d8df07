"""For every test: a seed, its share of the cores, the rules for tests/gpu and tests/kernels."""

import gc
import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("guardtest")  # so that a helper's failed assert shows its values
from guardtest import in_ci  # noqa: E402

TESTS = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# What pytest finds by itself; a folder that is asked for by its path is collected all the same.
# The integrations need trainers that .venv does not hold: `make test-integrations`.
collect_ignore = ["integrations"]
if not INTERPRETING:
    # Triton reads the variable when it is first imported, so these run in a process of their own.
    collect_ignore.append("kernels")

# No deadline: the first call of a property may compile, and machines are shared. In CI the same
# commit gets the same examples; elsewhere every run draws new ones.
hypothesis.settings.register_profile(
    "fastguard", deadline=None, derandomize=in_ci(), print_blob=True
)
hypothesis.settings.load_profile("fastguard")


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # with more threads than cores, OpenMP spends its time waiting
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    kernels = "in triton's interpreter" if INTERPRETING else "not here, see `make kernels-test`"
    return [f"torch: {torch.__version__}, {device}", f"tests/kernels: {kernels}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for folder in ("gpu", "kernels"):
            if item.path.is_relative_to(TESTS / folder):
                item.add_marker(folder)
    # The soak last: where time is cut off, everything else has been said.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection(session: pytest.Session) -> None:
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hides everything imported and collected from the garbage collector: no test releases it, and
    each full collection would traverse it for 0.2 s.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if torch.cuda.is_available():
        return
    if item.get_closest_marker("kernels") and not INTERPRETING:
        pytest.fail("no CUDA device: set TRITON_INTERPRET=1 (`make kernels-test`)", pytrace=False)
    if item.get_closest_marker("gpu"):
        if os.environ.get("FASTGUARD_REQUIRE_GPU") == "1":
            pytest.fail("no CUDA device, and FASTGUARD_REQUIRE_GPU=1", pytrace=False)
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def nothing_left_to_log(request: pytest.FixtureRequest) -> None:
    """For tests that read the log: a guard logs what it held back when it is collected, and those
    of earlier tests are to do so before.
    """
    if "caplog" in request.fixturenames:
        gc.collect()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test: same result alone and in the suite."""
    seed = 20260101
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
