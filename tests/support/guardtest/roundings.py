"""Values whose squares have the largest rounding errors in float32 sums, as on consumer GPUs."""

import inspect

import torch

# These patterns had the largest errors of tree sums among millions of random patterns: 7e-8 to 9e-8
# of the norm, and at some lengths 13e-8 to 15e-8 of a norm in float32.
BAD_PATTERNS = {
    torch.float32: [0.6765885, 1.0098354, 0.3796353, 1.5557141],
    torch.bfloat16: [0.072265625, 0.3828125, 8, 0.357421875, 0.234375, 0.12890625, 0.5390625,
                     0.099609375],
    torch.float16: [3.640625, 0.31982421875, 120.1875, 44.78125, 0.0574951171875, 4.078125,
                    0.5380859375, 0.15576171875],
}  # fmt: skip


def sum_whole_vectors(monkeypatch, dtype: torch.dtype) -> None:
    """Makes the kernels measure this dtype as on GPUs with slow float64."""
    from fastguard.kernels import measure

    monkeypatch.setattr(measure, "group_of", lambda *_: 16 // dtype.itemsize)
    # Cached variants have the group size of this device.
    monkeypatch.setattr(measure, "_variant", inspect.unwrap(measure._variant))
