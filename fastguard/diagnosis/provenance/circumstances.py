"""Explains failures by the arguments of a call, where the ranges of its inputs show nothing.

Examples are a variance of too few values, a CTC target longer than its input, and a softmax over a
row of -Inf. `explain_call` examines the call that produced the first NaN or Inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.diagnosis.ctc_lengths import REMEDY, unaligned
from fastguard.diagnosis.replay.calls import Call


@dataclass(frozen=True, slots=True)
class Explanation:
    """An explanation from the arguments of a call.

    Attributes:
        kind: The usual name of the fault.
        evidence: What in the arguments explains the NaN or Inf.
        remedy: What to do about the fault.
    """

    kind: str
    evidence: str
    remedy: str


def explain_call(call: Call, outputs: Sequence[Tensor]) -> Explanation | None:
    """Explains the non-finite outputs of a call by its arguments, if possible."""
    name = call.name.strip("_")
    check = _CHECKS.get(name)
    return None if check is None else check(call, outputs)


# Variances.

_FEW_VALUES = (
    "use correction=0 (unbiased=False), which gives a variance of 0 for one value, and add an eps "
    "where you divide by the variance. Or skip inputs with too few values: drop a last batch of "
    "one sample, and do not normalize a single element."
)


def _too_few(call: Call, outputs: Sequence[Tensor]) -> Explanation | None:
    self = call.argument("self")
    correction = call.argument("correction")
    correction = 1 if correction is None else correction
    out = outputs[0]
    n = self.numel() // out.numel() if out.numel() else 0
    if not n or n > correction:
        return None
    what = "standard deviation" if "std" in call.name else "variance"
    values = f"{n} value{'s' * (n > 1)}"
    spread = "0" if n == 1 else "a nonzero sum"
    return Explanation(
        "variance of too few values",
        f"the {what} of {values} with correction={correction:g} (Bessel's) divides {spread} by "
        f"{n} - {correction:g}, taken as 0",
        _FEW_VALUES,
    )


# Divisions by a number counted in Python.


def _divided_by_zero(call: Call, outputs: Sequence[Tensor]) -> Explanation | None:
    self, other = call.argument("self"), call.argument("other")
    if isinstance(other, Tensor):
        if not other.ndim and not other.is_complex() and not other and _is_symmetric(self):
            return _COVARIANCE
        if other.is_floating_point() or other.is_complex():
            return None  # the range of the operand shows the cause
        zeros, n = int((other == 0).sum()), other.numel()
        if not zeros:
            return None
        evidence = f"{zeros} of {n} denominators are exactly 0; they are integers, {other.dtype}"
        evidence = evidence.replace("torch.", "") if n > 1 else "the denominator, an integer, is 0"
    elif other == 0:
        evidence = "the denominator is the Python number 0"
    else:
        return None
    return Explanation(
        "division",
        evidence,
        "an empty mask gives a count of 0, and one sample gives n - 1 = 0: skip such a batch, or "
        "divide by max(count, 1) or count.clamp_min(1). Variances and torch.cov accept "
        "correction=0.",
    )


_COVARIANCE = Explanation(
    "covariance of too few samples",
    "a symmetric matrix is divided by 0, as torch.cov and torch.corrcoef do if there are no more "
    "samples than the correction, which is 1 by default",
    "pass correction=0 to torch.cov, for which the covariance of one sample is 0; or skip batches "
    "with too few samples, as torch.corrcoef of one sample is 0/0 with any correction.",
)


def _is_symmetric(matrix: Tensor) -> bool:
    """Whether a tensor is a matrix that equals its conjugate transpose, up to rounding.

    A single number is not counted as one.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 1:
        return False
    return torch.allclose(matrix, matrix.mH, rtol=1e-3)


# CTC.


def _ctc(call: Call, outputs: Sequence[Tensor]) -> Explanation | None:
    losses = outputs[0].flatten()
    inputs = call.argument("input_lengths")
    samples = unaligned(call.argument("targets"), inputs, call.argument("target_lengths"))
    found = [sample for sample in samples if not losses[sample.sample].isfinite()]
    if not found:
        return None
    return Explanation(
        "CTC target longer than its input",
        f"{len(found)} of {len(losses)} samples cannot be aligned, so their loss is Inf: "
        f"{found[0]}",
        f"pass zero_infinity=True (nn.CTCLoss, F.ctc_loss) to ignore such samples; or {REMEDY}",
    )


# Cross-entropy.


def _nothing_counts(call: Call, outputs: Sequence[Tensor]) -> Explanation | None:
    """Explains a mean over targets that are all ignored or have weight 0."""
    targets, ignored = call.argument("target"), call.argument("ignore_index")
    weight = call.argument("weight")
    if not targets.numel():
        return None  # the range of the operand shows the cause
    counted = targets[targets != ignored]
    if not counted.numel():
        evidence = f"all {targets.numel()} targets are ignore_index={ignored}"
    elif weight is not None and not bool(weight[counted].any()):
        evidence = f"the class weights of all {counted.numel()} targets that are not ignored are 0"
    else:
        return None
    return Explanation(
        "mean of nothing",
        f"{evidence}, so the mean is 0/0",
        "skip such a batch, or take the sum and divide by max(count, 1). If this happens in every "
        "batch, check how targets are marked. Usual causes are a prompt mask that covers the "
        "answer, sequences that are cut off before the answer, and a padding token that is also a "
        "label.",
    )


# Softmax.


def _masked_rows(call: Call, outputs: Sequence[Tensor]) -> Explanation | None:
    self, dim = call.argument("self"), call.argument("dim")
    if not isinstance(dim, int) or not self.ndim or not self.shape[dim]:
        return None
    empty = (self == -math.inf).all(dim)
    n = int(empty.sum())
    if not n or call.name.strip("_") == "logsumexp":
        return None
    return Explanation(
        "exponential or softmax",
        f"{n} of {empty.numel()} rows are entirely -Inf: every position is masked, so the softmax "
        "is 0/0",
        "leave at least one position of every row unmasked. Padding may mask whole samples, and "
        "masks may be inverted: nn.MultiheadAttention masks where True, "
        "scaled_dot_product_attention where False. Or mask with a large negative number, "
        "torch.finfo(x.dtype).min, and set the fully masked rows to 0 afterward.",
    )


_CHECKS: dict[str, Callable[[Call, Sequence[Tensor]], Explanation | None]] = {
    **dict.fromkeys(("std", "var", "std_mean", "var_mean"), _too_few),
    **dict.fromkeys(("div", "true_divide", "remainder", "fmod"), _divided_by_zero),
    **dict.fromkeys(("ctc_loss", "cudnn_ctc_loss"), _ctc),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nothing_counts),
    **dict.fromkeys(("softmax", "log_softmax"), _masked_rows),
}
