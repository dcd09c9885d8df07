"""The public names of `fastguard`, which are imported when they are first used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastguard


def test_all_lists_of_public_names_are_equal():
    imports = {
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(Path(fastguard.__file__).read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastguard")
        for name in node.names
    }
    by_module = fastguard._NAMES_BY_MODULE
    homes = {f"fastguard.{m}.{n}" for m, names in by_module.items() for n in names.split()}
    assert imports == homes and len(fastguard.__all__) == len(imports)
    assert set(fastguard.__all__) == {place.rpartition(".")[2] for place in imports}


def test_every_public_name_is_documented():
    assert [name for name in fastguard.__all__ if not getattr(fastguard, name).__doc__] == []


def test_dir_and_attribute_errors_work_as_in_any_module():
    assert set(fastguard.__all__) <= set(dir(fastguard))
    assert fastguard.SpikeRule is fastguard.SpikeRule
    assert fastguard.checkpoints.roll_back_file.__module__.startswith("fastguard.checkpoints")
    with pytest.raises(AttributeError, match="module 'fastguard' has no attribute 'clip_grads'"):
        fastguard.clip_grads  # noqa: B018
    with pytest.raises(ImportError, match="clip_grads"):
        from fastguard import clip_grads  # noqa: F401


COMPILED = """
import torch, fastguard
weight = torch.nn.Parameter(torch.ones(4))
weight.grad = torch.ones(4)
@torch.compile(fullgraph=True, backend="eager")
def clip():
    return fastguard.clip_grad_norm_([weight], 1.0)
assert clip().item() == 2.0
"""


def test_a_name_may_be_first_used_in_compiled_code():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
