"""Seeds every test, divides the cores among workers, and marks tests/gpu and tests/kernels."""

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

# Folders that pytest skips unless their path is given.
# The integrations need trainers that are not in .venv: `make test-integrations`.
collect_ignore = ["integrations"]
if not INTERPRETING:
    # Triton reads the variable when it is first imported, so these tests need a separate process.
    collect_ignore.append("kernels")

# There is no deadline, because the first call of a property may compile and machines are shared. In
# CI, a commit always gets the same examples; elsewhere, every run draws new examples.
hypothesis.settings.register_profile(
    "fastguard", deadline=None, derandomize=in_ci(), print_blob=True
)
hypothesis.settings.load_profile("fastguard")


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # OpenMP is slow with more threads than cores
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
    # Slow tests run last, so that all other tests have reported if time runs out.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection(session: pytest.Session) -> None:
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hides all imported and collected objects from the garbage collector. No test releases these
    objects, and each full collection would take 0.2 s to traverse them.
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
def collect_earlier_guards(request: pytest.FixtureRequest) -> None:
    """Collects the guards of earlier tests before a test that reads the log, because a guard logs
    its withheld messages when it is collected.
    """
    if "caplog" in request.fixturenames:
        gc.collect()
        gc.freeze()  # else the next one would again traverse all that tests have imported: 0.3 s


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, so that its result does not depend on other tests."""
    seed = 20260101
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
