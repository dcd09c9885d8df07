"""`part_gradients`: the gradient norm of each part of a loss with respect to each parameter.

The value of a part does not show its effect: PPO's policy loss is about 0 at every step, and an
entropy bonus is negative. A small gradient has two possible causes. A part at its optimum, such as
the entropy of a new policy or a KL term that starts at 0, has a small gradient only at the current
weights. A part whose factor is too small has a small gradient at all weights. `perturb` changes the
weights, so that the gradient can be measured at other weights too.
"""

from __future__ import annotations

import torch
from torch import nn

from fastguard.diagnosis.gradients import hides_parameters
from fastguard.diagnosis.replay.losses import loss_parts
from fastguard.diagnosis.replay.replay import copied
from fastguard.diagnosis.replay.subject import Subject

MAX_PARTS = 8
"""Maximum number of parts to check, since each needs a separate backward pass."""


def part_gradients(
    subject: Subject, parameters: dict[str, nn.Parameter]
) -> dict[str, dict[str, float]]:
    """Returns gradient norms by part of the loss and parameter; unreached parameters are missing.

    Runs one step. The result is empty if the loss is a single number, or if a reentrant activation
    checkpoint hides the parameters.
    """
    with subject.autocast:
        parts = loss_parts(subject.step(subject.model, copied(subject.batch)))
    if not 1 < len(parts) <= MAX_PARTS:
        return {}
    if any(part.requires_grad and hides_parameters(part) for part in parts.values()):
        return {}
    found: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        found[name] = {}
        if not part.requires_grad:
            continue
        gradients = torch.autograd.grad(
            part.sum(), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and gradient.numel():
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                norm = float(
                    torch.linalg.vector_norm(
                        torch.view_as_real(dense) if dense.is_complex() else dense.float()
                    )
                )
                found[name] |= {parameter: norm} if norm else {}
    return found


@torch.no_grad()
def perturb(parameters: dict[str, nn.Parameter]) -> None:
    """Adds noise to the weights.

    The noise is half of the weights' rms, or half of a usual initial rms if that is larger.
    """
    for parameter in parameters.values():
        if parameter.ndim > 1 and parameter.is_floating_point():
            rms = float(parameter.detach().double().square().mean().sqrt())
            usual = (parameter.numel() / parameter.shape[0]) ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * max(rms, usual))
