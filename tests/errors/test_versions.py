"""Differences between versions of torch and Triton are in one place, and correct."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastguard.errors import versions

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("fastguard", "kernels", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name not in ("versions.py", "test_versions.py")
]


def asks_for_a_version(tree: ast.Module) -> list[int]:
    """Returns the lines that compare versions."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and any(
            isinstance(part, ast.Attribute | ast.Name)
            and re.fullmatch(r"TORCH|__version__|version_info", ast.unparse(part).split(".")[-1])
            for part in ast.walk(node)
        )
        and any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
    ]


def test_no_other_file_asks_for_a_version():
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for path in SOURCES
        if (lines := asks_for_a_version(ast.parse(path.read_text())))
    }
    assert found == {}


def test_the_search_finds_version_comparisons():
    assert asks_for_a_version(ast.parse("x = 1\nif torch.__version__ < (2, 12): pass")) == [2]
    assert asks_for_a_version(ast.parse("assert f.__version__ == '1'")) == []


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("2.8.0a0+git1", (2, 8)),
        ("3.10", (3, 10)),
        ("2.16.0.dev1", (2, 16)),
    ],
)
def test_the_numbers_of_a_version(version, numbers):
    assert versions.numbers_of(version) == numbers


def test_features_listed_as_missing_are_missing():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    assert hasattr(p, "grad_dtype") is not versions.GRAD_DTYPE.missing
    adagrad = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))], fused=True)
    obeys = getattr(adagrad, "_step_supports_amp_scaling", False)
    assert obeys is not versions.FUSED_ADAGRAD.missing


def test_the_dtype_of_a_future_gradient():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    assert versions.grad_dtype_of(p) == torch.bfloat16
    if not versions.GRAD_DTYPE.missing:
        p.grad_dtype = torch.float32
        assert versions.grad_dtype_of(p) == torch.float32
        p.grad_dtype = None  # any dtype: autograd then uses the dtype of the computation
        assert versions.grad_dtype_of(p) == torch.bfloat16


def test_torchs_check_of_inputs_works_with_this_torch():
    grads = [torch.ones(2), torch.ones(3)]
    guards = versions.tensor_guards(grads)
    assert guards.check(*map(torch.zeros_like, grads)) and not guards.check(*reversed(grads))


def test_every_missing_feature_is_in_the_table_of_the_documentation():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    for feature in versions.FEATURES:
        since = ".".join(map(str, feature.since))
        (row,) = (line for line in page.splitlines() if f"| {feature.name} |" in line)
        assert f"| {since} |" in row and feature.without in row
