"""Checks an installed wheel in its environment: `python -I wheel_check.py`.

tests/test_packaging.py runs this with the torch that is already installed. `make wheel-test` runs
it with only the required dependencies, so that an import of an optional dependency fails.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sysconfig
from pathlib import Path

import torch

import fastguard
import fastguard.kernels

SITE = Path(sysconfig.get_path("purelib")).resolve()
DRAWN = (
    "monitor.live", "monitor.screen", "report.culprit_map", "report.curves", "report.figure",
    "report.incident_marks", "report.page", "report.style", "report.watched_maps",
)  # fmt: skip
MAY_NEED_AN_EXTRA = (
    "fastguard.kernels.",
    "fastguard.integrations.",
    "fastguard.optim.triton",
    "fastguard.stages.triton",
    *(f"fastguard.commands.{module}" for module in DRAWN),
)


def installed_here(file: str | None) -> bool:
    return file is not None and Path(file).resolve().is_relative_to(SITE)


def check_location() -> None:
    for module in (fastguard, fastguard.kernels):
        assert installed_here(module.__file__), f"{module.__name__} comes from {module.__file__}"


def check_metadata() -> None:
    distribution = importlib.metadata.distribution("torch-fastguard")
    assert distribution.version == fastguard.__version__
    assert (distribution.read_text("top_level.txt") or "").split() == ["fastguard"]
    assert (SITE / "fastguard" / "py.typed").is_file()


def check_top_level_kernels_is_not_ours() -> None:
    spec = importlib.util.find_spec("kernels")  # another project has a package of this name
    assert spec is None or not installed_here(spec.origin), f"the wheel installs {spec.origin}"


def check_every_module_imports() -> None:
    """Only adapters, kernels and modules that draw on a screen or a page may import optional
    packages.
    """
    names = [module.name for module in pkgutil.walk_packages(fastguard.__path__, "fastguard.")]
    for exempt in MAY_NEED_AN_EXTRA:
        assert any(name.startswith(exempt) for name in names), f"no module is named {exempt}"
    for name in names:
        if name != "fastguard.__main__" and not name.startswith(MAY_NEED_AN_EXTRA):
            importlib.import_module(name)


def check_it_works() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert fastguard.clip_grad_norm_([weight], max_norm=1.0).item() == 5.0
    assert abs(weight.grad.norm().item() - 1.0) < 1e-5

    optimizer = fastguard.GuardedOptimizer(torch.optim.SGD([weight], lr=1.0), max_norm=1.0)
    weight.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0]
    assert optimizer.skipped_steps == 1


if __name__ == "__main__":
    check_location()
    check_metadata()
    check_top_level_kernels_is_not_ours()
    check_every_module_imports()
    check_it_works()
    print(f"torch-fastguard {fastguard.__version__} works with torch {torch.__version__}")
