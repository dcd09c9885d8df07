"""Benchmark cases of a few kilobytes, and their contenders."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from fastguard.commands.bench import Case
from fastguard.commands.bench.contenders import CONTENDERS, PEERS_ON_CUDA
from fastguard.commands.bench.machine import Ceilings

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
LIMIT = Ceilings(read_gb_s=10.0, update_gb_s=20.0, copy_gb_s=20.0)
SHAPES = [(40, 7), (7,), (3, 5, 2), (300,)]


def benchmarks(name: str) -> ModuleType:
    """Imports a module of benchmarks/, which is not installed."""
    if "benchmarks" not in sys.modules:
        place = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", place / "__init__.py", submodule_search_locations=[str(place)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"benchmarks.{name}")


READ_PASS = benchmarks("contenders").READ_PASS  # the import adds the contenders of the suite
ONLY_READ = ("fastguard measure", "fastguard measure flat", READ_PASS)
EAGER = tuple(name for name in CONTENDERS if "compiled" not in name and name not in ONLY_READ)
ON_CPU = tuple(name for name in EAGER if name not in PEERS_ON_CUDA)


def a_case(**changes) -> Case:
    return replace(Case("tiny", SHAPES, EAGER), **changes)
