"""The wrapped optimizer's part of a state dict: loaded whole, bit for bit, or not at all.

Loading is torch's, but torch takes what another optimizer saved, changes what it holds before it
finds an error, and casts numbers to the dtype of the parameter that were never of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Entries without which a parameter's state is that of another optimizer with the same settings.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_NEEDED: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: _MOMENTS,
    torch.optim.AdamW: _MOMENTS,
    torch.optim.NAdam: (*_MOMENTS, "mu_product"),
    torch.optim.RAdam: _MOMENTS,
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
}
# The dimension over which Adafactor keeps means alone.
_MEAN_OVER = {"row_var": -1, "col_var": -2}


def opened(state_dict: object) -> dict[str, Any]:
    """A shallow copy, for hooks to change.

    Raises:
        TypeError: It is no mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"the state dict is a {type(state_dict).__name__}; pass what opt.state_dict() returned"
        )
    return dict(state_dict)


def check_parts(state_dict: Mapping[str, Any]) -> None:
    """Raises a ValueError for what is no state dict of an optimizer."""
    remedy = "pass what opt.state_dict() returned"
    missing = [repr(key) for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"the state dict lacks {' and '.join(missing)}; {remedy}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict['state'] is a {type(state).__name__}; {remedy}")
    if not isinstance(groups, list | tuple):
        raise ValueError(f"state_dict['param_groups'] is a {type(groups).__name__}; {remedy}")
    for i, group in enumerate(groups):
        where = f"state_dict['param_groups'][{i}]"
        if not isinstance(group, Mapping):
            raise ValueError(f"{where} is a {type(group).__name__}; {remedy}")
        if "params" not in group:
            raise ValueError(f"{where} lacks 'params'; {remedy}")


def load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Loads the state of the wrapped optimizer, bit for bit.

    What fits is judged after torch has loaded it: hooks of the optimizer may adapt a state dict,
    and torch adds the settings that older releases did not have.

    Raises:
        ValueError: It was saved from another optimizer or model; nothing was changed.
    """
    name = type(optimizer).__name__
    before = optimizer.state, optimizer.param_groups
    given = [state_dict]
    hook = optimizer.register_load_state_dict_pre_hook(lambda _, adapted: given.append(adapted))
    loaded = False
    try:
        optimizer.load_state_dict(state_dict)
        wrong = _misfit(optimizer, *before)
        if wrong is not None:
            raise ValueError(wrong)
        _take_back_casts(optimizer, given[-1], before[0])
        loaded = True
    except (LookupError, TypeError, AttributeError) as error:  # says neither value nor remedy
        wrong = _misfit(optimizer, *before)
        why = wrong or f"{name} cannot load this state dict: {error!r}; load one that it saved"
        raise ValueError(why) from error
    finally:
        hook.remove()
        if not loaded:
            optimizer.state, optimizer.param_groups = before  # type: ignore[assignment]


def _misfit(
    optimizer: Optimizer, live: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> str | None:
    """Why what is loaded does not belong to the optimizer.

    Args:
        optimizer: As it is after loading.
        live: Its state before.
        groups: Its param groups before; torch adds to `defaults` what no group of a custom
            optimizer holds.
    """
    name = type(optimizer).__name__
    for i, (group, own) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        missing = [key for key in optimizer.defaults if key in own and key not in group]
        if missing:
            return (
                f"param group {i} lacks {', '.join(missing)}: another optimizer saved this state "
                f"dict; load one that was saved from {name}"
            )
    scalars = _scalars(optimizer)
    for i, p in enumerate(_parameters(optimizer)):
        state = optimizer.state.get(p, {})
        if not isinstance(state, Mapping):
            return (
                f"the state of parameter {i} is a {type(state).__name__}, not a dict; "
                "pass what opt.state_dict() returned"
            )
        missing = [key for key in _NEEDED.get(type(optimizer), ()) if state and key not in state]
        if missing:
            return (
                f"the state of parameter {i} lacks {', '.join(missing)}: another optimizer saved "
                f"this state dict; load one that was saved from {name}"
            )
        for key, value in state.items():
            if not isinstance(value, Tensor) or key == "step" or key in scalars:
                continue
            wanted = _shape_of_entry(optimizer, p, key, live.get(p, {}).get(key))
            if wanted is not None and value.shape != wanted:
                return (
                    f"the state of parameter {i} has {key} of shape {tuple(value.shape)}, expected "
                    f"{tuple(wanted)}: it was saved for a parameter of another shape; load the "
                    "state of the same model"
                )
    return None


def _shape_of_entry(
    optimizer: Optimizer, p: Tensor, key: str, live: object
) -> Sequence[int] | None:
    """The shape that an entry of a parameter's state must have; None: nobody knows."""
    if isinstance(live, Tensor):
        return live.shape if _is_of_torch(optimizer) or live.shape == p.shape else None
    if not _is_of_torch(optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        return None
    shape = list(p.shape)
    if key in _MEAN_OVER and len(shape) > 1:
        shape[_MEAN_OVER[key]] = 1
    return torch.Size(shape)


def _take_back_casts(
    optimizer: Optimizer, saved: Mapping[str, Any], live: Mapping[Any, Any]
) -> None:
    """Puts saved tensors where torch has put casts to the dtype of the parameter.

    A dtype that the live state has is right. Without one, what an optimizer of torch keeps in the
    shape of the parameter follows the parameter, so that a state of float32 training can be loaded
    into 16-bit parameters, and all else stays as it was saved.
    """
    scalars, of_torch = _scalars(optimizer), _is_of_torch(optimizer)
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    for i, p in zip(ids, _parameters(optimizer), strict=False):
        own, before = saved["state"].get(i), live.get(p, {})
        if not isinstance(own, Mapping):
            continue
        for key, value in optimizer.state.get(p, {}).items():
            own_dtype = isinstance(value, Tensor) and (key in before or key in scalars)
            if own_dtype or not of_torch:
                restored = _as_saved(key, value, own.get(key), before.get(key))
                optimizer.state[p][key] = restored


def _as_saved(key: object, loaded: Any, saved: Any, live: Any) -> Any:
    """A loaded entry with the dtypes of the saved one."""
    if key == "step":  # torch has its own rule for where and what it is
        return loaded
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        if saved.dtype == loaded.dtype:
            return loaded
        if isinstance(live, Tensor) and live.dtype != saved.dtype:
            return loaded
        return saved.to(loaded.device, copy=True)
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        was = live if isinstance(live, Mapping) else {}
        return {k: _as_saved(k, v, saved.get(k), was.get(k)) for k, v in loaded.items()}
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple):
        pairs = zip(loaded, saved, strict=True)
        return type(loaded)(_as_saved(None, v, s, None) for v, s in pairs)
    return loaded


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _scalars(optimizer: Optimizer) -> set[str]:
    """The entries that are one number for every parameter, whatever its shape."""
    states = [s for s in optimizer.state.values() if isinstance(s, Mapping)]
    tensors = [(k, v.dim()) for s in states for k, v in s.items() if isinstance(v, Tensor)]
    return {k for k, dim in tensors if dim == 0} - {k for k, dim in tensors if dim > 0}


def _is_of_torch(optimizer: Optimizer) -> bool:
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")
