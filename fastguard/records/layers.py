"""Groups the results of a watched step by layer, the module that a parameter belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


def layer_of(parameter: str) -> str:
    """Returns the name of the module that a parameter belongs to.

    Example:
        >>> layer_of("blocks.0.qkv.weight"), layer_of("scale")
        ('blocks.0.qkv', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def layer_norms(watch: Mapping[str, Any]) -> dict[str, float]:
    """Returns the L2 norm of the gradients of each layer.

    Args:
        watch: As in `StepRecord`; values other than positive finite numbers are ignored.

    Example:
        >>> layer_norms({"tensor_norms": {"head.weight": 3.0, "head.bias": 4.0, "scale": None}})
        {'head': 5.0}
    """
    return _by_layer(watch.get("tensor_norms"), lambda norms: math.hypot(*norms))


def layer_ratios(watch: Mapping[str, Any]) -> dict[str, float]:
    """Returns the largest |update| / |weight| among the tensors of each layer.

    Args:
        watch: As in `StepRecord`; values other than positive finite numbers are ignored.

    Example:
        >>> layer_ratios({"update_ratio": {"head.weight": 1e-3, "head.bias": 2e-2}})
        {'head': 0.02}
    """
    return _by_layer(watch.get("update_ratio"), max)


def _by_layer(values: object, combine: Callable[[Iterable[float]], float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, value in _positive(values):
        found.setdefault(layer_of(name), []).append(value)
    joined = {layer: combine(values) for layer, values in found.items()}
    return {layer: value for layer, value in joined.items() if math.isfinite(value)}


def _positive(values: object) -> Iterator[tuple[str, float]]:
    """Yields the positive finite numbers of a mapping, which may come from a malformed file."""
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        if isinstance(name, str) and type(value) in (int, float):
            try:
                number = float(value)
            except OverflowError:
                continue
            if 0 < number < math.inf:
                yield name, number
