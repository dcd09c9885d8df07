"""Engines that step by themselves: there is no optimizer step left to guard, and a trainer says so.

DeepSpeed and Megatron keep copies of the gradients and clip them by their own settings; a guard
around the optimizer that they were given would clip a second time, or never be called at all.
"""

from __future__ import annotations


def engine_error(engine: str) -> ValueError:
    """What to raise where a trainer steps through an engine.

    Args:
        engine: What the trainer calls it.
    """
    return ValueError(
        f"under {engine} an engine steps by itself and clips by settings of its own, so nothing "
        "can be guarded here; train with DDP or FSDP2, or use the engine without the trainer and "
        "guard what it is given, as docs/recipes.md does with DeepSpeed and Megatron-Core"
    )


def refuse_deepspeed(strategy: object) -> None:
    """Raises a ValueError for a strategy that trains through DeepSpeed.

    Known by the names of its classes: each edition of Lightning has its own, also outside Lightning
    (Habana's), and they are kinds of DDPStrategy to some and not to others.

    Example:
        >>> refuse_deepspeed(object())
    """
    if any("DeepSpeed" in kind.__name__ for kind in type(strategy).__mro__):
        raise engine_error(type(strategy).__name__)
