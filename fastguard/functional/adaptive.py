"""`clip_grad_adaptive_`: adaptive gradient clipping (AGC) as a function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastguard.functional.arguments import Parameters, gradients_for, limit_like, listed, mode_of
from fastguard.functional.ops import define
from fastguard.gradients.buckets import bucketize, parameters_of
from fastguard.gradients.tensor_kinds import TRACED, kind_of
from fastguard.gradients.unit_buckets import refuse_dtensors, refuse_shards, unit_buckets
from fastguard.stages.agc import AGC, limited_positions
from fastguard.stages.apply import scale
from fastguard.stages.decide import raise_if_nonfinite
from fastguard.stages.measure import measure, norm_type_of
from fastguard.stages.units import clip_units


@torch.no_grad()
def clip_grad_adaptive_(
    parameters: Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    *,
    exclude: Iterable[str | Tensor] = (),
    nonfinite: Literal["propagate", "zero", "raise"] = "propagate",
) -> None:
    """Clips the gradient of each unit to a fraction of the norm of its weights (AGC).

    For a unit with weights w and gradient g:

        g <- g * limit / norm(g)   if norm(g) > limit = clip_factor * max(norm(w), eps)

    A unit is a slice along the first dimension (a row of a linear layer, a filter of a
    convolution); a tensor with at most one dimension is a single unit. Source: Brock et al. 2021,
    arXiv 2102.06171. The results equal the results of `timm.utils.agc.adaptive_clip_grad`, except
    that there is no lower bound of 1e-6 for the norm of a gradient.

    Args:
        parameters: A tensor, or an iterable of tensors or of `(name, tensor)` pairs such as
            `model.named_parameters()`. Their gradients are changed in place.
        clip_factor: Limit of a unit's gradient norm, as a fraction of its weight norm, > 0. The
            paper uses 0.01 for a batch size of 4096. Default: 0.01.
        eps: Lower bound for the norm of the weights, > 0, so that zero weights can learn.
            Default: 1e-3.
        norm_type: p > 0 of the p-norm; `inf`: the largest magnitude. Default: 2.
        exclude: Parameters that are not clipped, as tensors or as names, see `AGC`. The paper
            excludes the last linear layer. Default: none.
        nonfinite: How to handle NaN and Inf in gradients. `"propagate"`: a NaN makes all gradients
            of its unit NaN; an Inf becomes NaN, and all other gradients of its unit become 0; other
            units are not affected. `"zero"`: NaN and Inf are set to 0, and the norm is computed
            from the remaining elements. `"raise"`: an error is raised before anything is changed.
            `"zero"` and `"raise"` also apply to excluded parameters. Default: `"propagate"`.

    Raises:
        NonFiniteGradError: A gradient is non-finite, in raise mode; this waits for a GPU.
        TypeError, ValueError: An argument has the wrong type or is out of range; or a parameter is
            a DTensor or a shard of FSDP1 or DeepSpeed, which may contain only parts of units.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> p.grad = torch.tensor([[3.0, 4.0], [0.0, 1e-6]])
        >>> fastguard.clip_grad_adaptive_([p], clip_factor=0.1)
        >>> p.grad
        tensor([[3.0000e-01, 4.0000e-01],
                [0.0000e+00, 1.0000e-06]])
    """
    p = norm_type_of(norm_type)
    mode = mode_of(nonfinite, False)
    parameters = listed(parameters)
    grads, names = gradients_for(parameters, strict=True)
    tensors = parameters_of(parameters)
    compiling = torch.compiler.is_compiling()
    (refuse_dtensors if compiling else refuse_shards)(tensors, names)
    limited = limited_positions(tensors, names, [exclude] if isinstance(exclude, str) else exclude)
    present = {type(g) for g in grads if g is not None}
    if compiling or kind_of(present) is TRACED:
        _clip_compiled(grads, tensors, names, limited, clip_factor, eps, p, mode)
        return
    agc = AGC(clip_factor, eps)
    limits = torch.tensor([agc.clip_factor, agc.eps], dtype=torch.float64, device="cpu")
    _clip(grads, tensors, names, limited, limits, p, mode)


def _clip(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    names: Sequence[str] | None,
    limited: Sequence[int],
    limits: Tensor,
    norm_type: float,
    mode: str,
) -> None:
    """Clips units, after raising an error for non-finite gradients or cleaning them.

    Args:
        grads, weights, names: Gradients, weights and names of all parameters.
        limited: Positions of the parameters that are clipped.
        limits: float64 `(2,)` on the CPU: `clip_factor` and `eps`.
        norm_type: p > 0, or `inf`.
        mode: As `nonfinite` in `clip_grad_adaptive_`.
    """
    if mode != "propagate":
        buckets = bucketize(grads, names=names, norm_type=norm_type)
        stats = measure(buckets, norm_type)
        if mode == "raise":
            raise_if_nonfinite(stats)
        else:
            scale(buckets, torch.ones_like(stats.power_sum), stats.found_nonfinite)
    units = unit_buckets(
        [grads[i] for i in limited],
        [weights[i] for i in limited],
        None if names is None else [names[i] for i in limited],
        norm_type,
    )
    clip_units(units, limits, norm_type, propagates=True)


def _clip_compiled(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    names: list[str] | None,
    limited: Sequence[int],
    clip_factor: float,
    eps: float,
    norm_type: float,
    mode: str,
) -> None:
    """Clips by one custom op, which checks the limits while the graph runs."""
    ids = [i for i, grad in enumerate(grads) if grad is not None]
    if not ids:
        return
    places = [k for k, i in enumerate(ids) if i in limited]
    on_host = grads[ids[0]].new_empty(0, device="cpu")  # type: ignore[union-attr]
    limits = torch.cat([limit_like(clip_factor, on_host), limit_like(eps, on_host)])
    torch.ops.fastguard.clip_units(
        [grads[i] for i in ids],
        [weights[i].detach() for i in ids],
        limits,
        places,
        norm_type,
        mode,
        None if names is None else [names[i] for i in ids],
    )


def _clip_op(
    grads: list[Tensor],
    weights: list[Tensor],
    limits: Tensor,
    limited: list[int],
    norm_type: float,
    nonfinite: str,
    names: list[str] | None,
) -> None:
    AGC(*limits.tolist())
    _clip(grads, weights, names, limited, limits, norm_type, nonfinite)


define(
    "clip_units(Tensor(a!)[] grads, Tensor[] weights, Tensor limits, int[] limited,"
    " float norm_type, str nonfinite, str[]? names) -> ()",
    _clip_op,
)
