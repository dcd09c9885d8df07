"""Sizes around the limits of the fast path, and audits of all its blocks."""

import pytest
import torch

from fastguard.stages.cpu import l2_blocks, l2_sums
from fastguard.stages.cpu import measure as cpu_measure
from guardtest.cpu_norms import SMALL, assert_norm_is_true, edges
from guardtest.grads import DTYPES


@pytest.mark.parametrize("n", edges())
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.usefixtures("small_stages", "no_second_read")
def test_sizes_around_every_limit(dtype, n):
    x = torch.randn(n).to(DTYPES[dtype])
    assert_norm_is_true(x)
    assert_norm_is_true(x, torch.randn(1).to(x.dtype))
    assert_norm_is_true(torch.randn(63).to(x.dtype), x, x)


@pytest.mark.parametrize("length", [1, 7, 64, 100, 255, 256, 257])
@pytest.mark.parametrize("n_tensors", [50, 333])
@pytest.mark.usefixtures("small_stages", "no_second_read")
def test_many_small_tensors(n_tensors, length):
    assert_norm_is_true(*(torch.randn(length) * 1.05**i for i in range(n_tensors)))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_limits_with_their_real_values(monkeypatch, dtype):
    monkeypatch.undo()
    sizes = (l2_sums.ROW, l2_sums.BLOCK, l2_sums.ALONE, l2_sums.LARGE, l2_blocks.STAGE)
    grads = [torch.randn(n + d).to(DTYPES[dtype]) for n in sizes for d in (-1, 0, 1)]
    assert_norm_is_true(*grads)
    for n in (l2_sums.EXACT_BELOW - 1, l2_sums.EXACT_BELOW):
        assert_norm_is_true(torch.randn(n).to(DTYPES[dtype]))


@pytest.mark.usefixtures("small_stages")
def test_every_block_can_be_audited(monkeypatch):
    # Draws every block in turn, so a block read from the wrong position is detected.
    vectors = [torch.randn(n) for n in (300, 5, 70, 0, 64, 1000, 3, 128, 500, 40, 900)]
    n_draws = 400
    everywhere = (cpu_measure.np.arange(n_draws) + 0.5) / n_draws
    monkeypatch.setattr(l2_sums, "_FEW", everywhere)
    seen = {}
    exact_power_sums = l2_blocks.Blocks.exact_power_sums

    def spy(self, drawn):
        sums = exact_power_sums(self, drawn)
        if self.large:  # skips the blocks of small tensors, which are gathered
            seen.update(zip(drawn, sums, strict=True))
        return sums

    monkeypatch.setattr(l2_blocks.Blocks, "exact_power_sums", spy)
    assert_norm_is_true(*vectors)
    assert sorted(seen) == list(range(len(seen)))
    block, large = SMALL["BLOCK"], SMALL["LARGE"]
    rows = [
        v[k * block :][:block] for v in vectors if len(v) >= large for k in range(len(v) // block)
    ]
    middling = [v for v in vectors if block <= len(v) < large]
    stacked, alone = [], []
    for v in middling:
        if len(v) <= SMALL["ALONE"]:
            alone.append(v)
        else:
            *whole, rest = (*v.split(block), v[:0]) if len(v) % block == 0 else v.split(block)
            stacked += whole
            alone += [rest] if len(rest) else []
    expected = [v.double().square().sum().item() for v in rows + stacked + alone]
    assert [seen[k] for k in sorted(seen)] == pytest.approx(expected)
