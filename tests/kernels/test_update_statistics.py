"""The update kernel computes the statistics of `fastguard.optim.reference`, and changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastguard.kernels import columns, update_statistics, update_table
from fastguard.optim import contract, reference
from fastguard.optim import triton as triton_optim
from guardtest.updates import STORED, copied, random_update, same_bits, with_unit_limits, written

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Whole vectors and remainders, several blocks, unaligned rows, a scalar, an empty tensor.
SHAPES = [(6, 16), (5, 13), (), (0, 3), (70,), (3, 1100), (9000,)]
CASES: dict[str, dict[str, Any]] = {
    **{name: dict(algorithm="adamw", **options) for name, options in STORED.items()},
    "adam": dict(algorithm="adam"),
    "sgd": dict(algorithm="sgd"),
    "lion": dict(algorithm="lion", dtype=BF16),
    "fp16": dict(algorithm="adamw", dtype=torch.float16),
    "clean": dict(algorithm="adamw", clean=torch.ones(())),
}


def made(case: str, **options: Any):
    settings = dict(shapes=SHAPES, reproducible=True) | CASES[case] | options
    zeros = torch.zeros(len(SHAPES), 3, dtype=F64)
    return replace(random_update(**settings), statistics=zeros)


def check(update, rtol=1e-13):
    """Checks the statistics, and that the kernel writes the same without computing them."""
    theirs, plain = copied(update), replace(copied(update), statistics=None)
    triton_optim.update(update)
    triton_optim.update(plain)
    reference.update(theirs)
    torch.testing.assert_close(update.statistics, theirs.statistics, rtol=rtol, atol=0)
    others = written(plain)
    assert [n for n, t in written(update).items() if not same_bits(t, others[n])] == []
    return update.statistics


@pytest.mark.parametrize("case", CASES)
def test_statistics_equal_those_of_the_reference(case):
    # float64 bias corrections differ between NumPy and PyTorch
    found = check(made(case), rtol=1e-9 if case == "fp64" else 1e-13)
    assert (found[[1, 5, 6], :2] > 0).all()


@pytest.mark.parametrize("chunk", [48, 4096])
def test_sums_do_not_depend_on_chunks(chunk, monkeypatch):
    monkeypatch.setattr(update_table, "chunk_size", lambda *_: chunk)
    monkeypatch.setattr(update_table, "_layouts", {})
    monkeypatch.setattr(update_table, "_tables", {})
    check(made("fp32"))


@pytest.mark.parametrize("longest", [12, 2**16])
def test_limits_of_units(longest, monkeypatch):
    """Long units are split over chunks; short units are processed one by one in a chunk."""
    monkeypatch.setattr(triton_optim, "LONGEST_ROW", longest)
    update = with_unit_limits(made("fp32"), -1)
    check(update, rtol=1e-6)  # a coefficient may differ by one rounding


@pytest.mark.parametrize("found_inf", [1.0, math.nan])
def test_a_skipped_step_leaves_zeros(found_inf):
    update = made("fp32", found_inf=torch.tensor(found_inf))
    assert not check(update).any()


@pytest.mark.parametrize("case", ["fp32", "bf16", "master", "remainder"])
def test_nonfinite_weights_are_counted_and_not_summed(case):
    update = made(case)
    for i, bad in ((1, math.nan), (6, math.inf)):
        update.grads[i].view(-1)[2:5] = bad
    assert check(update)[:, 2].tolist() == [0, 3, 0, 0, 0, 0, 3]


def test_two_runs_give_the_same_bits():
    a, b = made("fp32"), made("fp32")
    triton_optim.update(a)
    triton_optim.update(b)
    assert same_bits(a.statistics, b.statistics)


def test_the_columns_match_the_contract():
    assert len(contract.STATISTICS) == update_statistics.N_STATISTICS.value


def test_the_table_names_the_chunks_of_each_tensor():
    key = ([5, 0, 9], [0, 0, 0], [0, 0, 0], [], 4, [], [])
    kind = (torch.device("cpu"), F32, 3)
    layout = update_table._new_layout(kind, key, np.ones(3, dtype=bool), ())
    rows = layout.tensors.view(3, columns.TENSOR_COLUMNS.value)
    owners = layout.chunks.view(-1, columns.UPDATE_COLUMNS.value)[:, columns.UPDATE_TENSOR.value]
    first, n = rows[:, columns.FIRST_CHUNK_COLUMN.value], rows[:, columns.CHUNKS_COLUMN.value]
    assert owners.tolist() == [0, 2]
    assert (first.tolist(), n.tolist()) == ([0, 1, 1], [1, 0, 1])
