"""Classifies operations that produce NaN or Inf, with evidence from their inputs and a remedy.

An operation is identified by its ATen operator (`aten.div.Tensor` is `div`) or its autograd node
(`DivBackward0` is also `div`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastguard.diagnosis.replay.tensor_range import TensorRange


@dataclass(frozen=True, slots=True)
class Kind:
    """Operations that fail in the same way.

    Attributes:
        name: The common name of these operations.
        operations: Operators and autograd nodes, without overload and underscore.
        remedy: What to do about the failure.
    """

    name: str
    operations: frozenset[str]
    remedy: str


def _kind(name: str, operations: str, remedy: str) -> Kind:
    return Kind(name, frozenset(operations.split()), remedy)


KINDS = (
    _kind(
        "division",
        "div divide true_divide reciprocal remainder fmod addcdiv floor_divide",
        "bound the denominator from below: x / (y + eps) for y >= 0, x / y.clamp_min(eps), or "
        "torch.nn.functional.normalize(x, eps=1e-6) to divide by a norm.",
    ),
    _kind(
        "square root or norm",
        "sqrt rsqrt norm linalg_vector_norm linalg_matrix_norm cdist euclidean_dist dist hypot std "
        "cdist_forward",
        "the derivative of a root is infinite at 0: add eps inside the root, (x.square().sum() + "
        "eps).sqrt(), or remove zeros before it; torch.where after the root does not help, "
        "because 0 * Inf is NaN.",
    ),
    _kind(
        "power",
        "pow float_power",
        "a fractional power of a negative number is NaN, a negative power of 0 is Inf, and a power "
        "below 1 has an infinite derivative at 0: clamp the base, x.clamp_min(eps) ** p.",
    ),
    _kind(
        "logarithm",
        "log log2 log10 log1p logit xlogy log_sigmoid special_entr binary_cross_entropy kl_div "
        "digamma lgamma",
        "clamp the argument, x.clamp_min(eps).log(), or use a fused function, which avoids the "
        "logarithm of 0: log_softmax, logsigmoid, binary_cross_entropy_with_logits.",
    ),
    _kind(
        "exponential or softmax",
        "exp exp2 expm1 sinh cosh softmax log_softmax logsumexp softplus safe_softmax tan "
        "scaled_dot_product_flash_attention_for_cpu scaled_dot_product_flash_attention "
        "scaled_dot_product_efficient_attention scaled_dot_product_attention_math "
        "scaled_dot_product_cudnn_attention scaled_dot_product_fused_attention_overrideable",
        "subtract the maximum first (softmax, logsumexp and log_softmax do), clamp the argument, "
        "and never mask all positions of an attention row: its softmax is 0/0.",
    ),
    _kind(
        "inverse function at the edge of its domain",
        "acos asin acosh atanh erfinv",
        "clamp the argument to the inside of its domain: x.clamp(-1 + eps, 1 - eps), or "
        "x.clamp_min(1 + eps) for acosh.",
    ),
    _kind(
        "matrix product or convolution",
        "mm bmm addmm baddbmm addbmm addmv mv dot vdot matmul linear einsum convolution "
        "convolution_overrideable conv1d conv2d conv3d mkldnn_convolution thnn_conv2d",
        "a sum of products exceeded the range of its dtype: normalize the inputs, lower the scale "
        "of the weights or the learning rate, or compute this layer in float32 or bfloat16.",
    ),
    _kind(
        "conversion to a narrower dtype",
        "to_copy to copy type_as",
        "the values exceed the range of the dtype; the largest float16 number is 65504. Scale the "
        "values down first, or keep them in bfloat16 or float32.",
    ),
    _kind(
        "normalization",
        "native_batch_norm batch_norm native_layer_norm layer_norm native_group_norm group_norm "
        "cudnn_batch_norm native_batch_norm_legit native_batch_norm_legit_no_stats var var_mean "
        "std_mean fused_rms_norm rms_norm batch_norm_with_update instance_norm",
        "the variance of one value is 0/0, and the variance of huge values overflows: check for "
        "batches of one sample, a running variance that is negative or Inf, and an eps of 0.",
    ),
    _kind(
        "mean of nothing",
        "mean nanmean nll_loss_forward nll_loss nll_loss_nd nll_loss2d_forward nll_loss2d median",
        "the mean is 0/0, because there were no elements, or every target was ignore_index. Skip "
        "such a batch, or divide a sum by max(count, 1).",
    ),
    _kind(
        "product",
        "mul addcmul prod cumprod square",
        "0 * Inf is NaN, and large factors overflow: select with torch.where instead of "
        "multiplying by a mask, and bound the factors.",
    ),
    _kind(
        "sum or difference",
        "add sub rsub sum cumsum mse_loss smooth_l1_loss l1_loss huber_loss addr add_relu",
        "Inf - Inf is NaN, and large terms overflow: find out why the terms are large, average "
        "instead of summing, and compute sums in float32.",
    ),
    _kind(
        "matrix decomposition",
        "linalg_svd linalg_eigh linalg_eig linalg_inv_ex linalg_cholesky_ex linalg_solve_ex svd "
        "linalg_qr linalg_lu_factor_ex linalg_slogdet linalg_det",
        "the matrix is singular, or its eigenvalues or singular values coincide: add eps times the "
        "identity.",
    ),
    _kind(
        "uninitialized memory",
        "empty empty_like empty_strided new_empty new_empty_strided",
        "a tensor from torch.empty was used before it was fully written: use torch.zeros.",
    ),
)

OUTSIDE = {
    "parameter": "an earlier step destroyed the weights: go back to a checkpoint that is "
    "verified to be finite, and let fastguard.GuardedOptimizer skip bad steps.",
    "buffer": "an earlier batch destroyed this buffer (NaN stays in running statistics): "
    "go back to a checkpoint that is verified to be finite, or reset the buffer.",
    "batch": "repair or drop this sample; fastguard.check_batch finds such batches before the "
    "step.",
    "constant": "check where this tensor is created; it is neither a parameter, nor a buffer, nor "
    "part of the batch.",
}

MEAN_OF_NOTHING = next(kind for kind in KINDS if kind.name == "mean of nothing")

_ROOT_OF_NEGATIVE = (
    "the root of a negative number is NaN: use x.clamp_min(0).sqrt(), or x.clamp_min(eps).sqrt() "
    "if you need its gradient or divide by it. Rounding can make values negative that should "
    "never be, such as a variance computed as E[x²] - E[x]²: use torch.var, or use float32."
)

_ROOT_IN_DENOMINATOR = (
    "1 / sqrt(0) is Inf: add eps inside the root, (x.square().mean(-1) + eps).rsqrt(), as "
    "normalization layers do."
)

OTHER = _kind(
    "",  # operations that have no typical failure
    "",
    "check in the ranges above which input is at the limit of what this operation accepts.",
)


def kind_of(operation: str) -> Kind:
    """Returns the kind of an ATen operator or autograd node, or `OTHER`."""
    name = base_name(operation)
    return next((kind for kind in KINDS if name in kind.operations), OTHER)


def kind_at(operation: str, inputs: Sequence[TensorRange]) -> Kind:
    """Returns the kind of an operation with these inputs; empty inputs mean 0/0."""
    if inputs and all(r.numel == 0 for r in inputs):
        return MEAN_OF_NOTHING
    return kind_of(operation)


def remedy_at(operation: str, inputs: Sequence[TensorRange]) -> str:
    """Returns the remedy for an operation with these inputs."""
    if _is_root(operation) and any(r.min < 0 for r in inputs if "gradient" not in r.name):
        return _ROOT_OF_NEGATIVE
    if operation.startswith("aten.rsqrt"):
        return _ROOT_IN_DENOMINATOR
    return kind_at(operation, inputs).remedy


def _is_root(operation: str) -> bool:
    return base_name(operation) in ("sqrt", "rsqrt")


def base_name(operation: str) -> str:
    """Returns `div` for `aten.div_.Tensor` and for `DivBackward0`."""
    if "." in operation:
        return operation.split(".")[1].strip("_")
    node = re.sub(r"Backward\d*$", "", operation)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", node).lower()


def evidence_of(kind: Kind, inputs: Sequence[TensorRange], operation: str = "") -> str:
    """Returns the properties of the inputs that explain a NaN or Inf; may be empty."""
    if kind is MEAN_OF_NOTHING and (empty := [f"{r.name} is empty" for r in inputs if not r.numel]):
        return "; ".join(empty)
    found = [f"{r.name} holds a NaN or Inf" for r in inputs if r.nonfinite]
    name = kind.name
    for r in inputs:
        if "gradient" in r.name:  # a gradient of 0 is harmless
            continue
        if name == "division":
            below = base_name(operation) == "reciprocal" and r.name == "self"
            if r.zeros and (
                below or r.name in ("other", "saved other", "tensor2", "saved tensor2")
            ):
                found.append(f"{r.zeros} of {r.numel} denominators are exactly 0")
        elif name in ("square root or norm", "logarithm", "power"):
            if r.zeros:
                found.append(f"{r.zeros} of {r.numel} elements of {r.name} are exactly 0")
            takes_any_sign = name == "square root or norm" and not _is_root(operation)
            if r.min < 0 and not takes_any_sign:
                found.append(f"{r.name} has negative elements down to {r.min:.4g}")
        elif name == "normalization" and r.name.endswith("running_var") and r.min < 0:
            found.append(f"the running variance goes down to {r.min:.4g}")
        elif name == "inverse function at the edge of its domain" and r.absmax >= 1:
            found.append(f"{r.name} reaches {r.absmax:.9g}")
    if not found and kind is not OTHER:
        largest = max((r for r in inputs if r.absmax == r.absmax), key=_absmax, default=None)
        if largest is not None and largest.absmax >= 1e3:
            found.append(f"{largest.name} reaches {largest.absmax:.4g}")
    return "; ".join(found)


def _absmax(r: TensorRange) -> float:
    return r.absmax
