"""Reads TensorBoard event files with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from fastguard.commands.scan.foreign import is_events

_HEAD = struct.Struct("<QI")
_CHECKSUM = 4


class Scalar(NamedTuple):
    """A scalar of an event file.

    Attributes:
        number: Index of the event, from 1.
        step: Step of the event.
        tag: Name of the scalar.
        value: Value, possibly non-finite.
    """

    number: int
    step: int
    tag: str
    value: float


class EventsError(Exception):
    """An event file cannot be read to its end; the message gives the reason."""


def is_event_file(file: BinaryIO) -> bool:
    """Whether a seekable open file is an event file; leaves it at its beginning."""
    first = file.read(64)
    file.seek(0)
    return is_events(first)


def read_scalars(path: str) -> Iterator[Scalar]:
    """Yields the scalars of an event file in writing order.

    Raises:
        EventsError: TensorBoard is not installed, or the file is damaged or truncated.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise EventsError(
            "the log is a TensorBoard event file; to read it, run: pip install "
            "'torch-fastguard[tensorboard]'"
        )
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    whole, problem = _whole_records(path)
    loader = iter(RawEventFileLoader(path).Load())
    for number in range(1, whole + 1):
        try:
            event = Event.FromString(next(loader))
        except StopIteration:
            raise EventsError(f"its event {number:,} has a wrong checksum") from None
        except Exception as error:  # protobuf's errors have no common base
            raise EventsError(f"its event {number:,} is damaged: {type(error).__name__}") from None
        for value in event.summary.value:
            if (scalar := _scalar(value)) is not None:
                yield Scalar(number, event.step, value.tag, scalar)
    if problem is not None:
        raise EventsError(problem)


def _whole_records(path: str) -> tuple[int, str | None]:
    """The number of complete records in the file, and the problem after them, if any.

    TensorBoard's reader trusts the length field of a record, and would allocate that much memory.
    """
    size = os.path.getsize(path)
    n = at = 0
    with open(path, "rb") as file:
        while at < size:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return n, "the log is a truncated event file"
            length, _ = _HEAD.unpack(head)
            at += _HEAD.size + length + _CHECKSUM
            if at > size:
                return n, "the log is a truncated or damaged event file"
            file.seek(at)
            n += 1
    return n, None


def _scalar(value: Any) -> float | None:
    """The number in a summary written by torch or TensorFlow 2; None if it is not a scalar."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor" or value.tensor.tensor_shape.dim:
        return None
    from tensorboard.util.tensor_util import make_ndarray

    try:
        return float(make_ndarray(value.tensor))
    except (TypeError, ValueError):  # the value is not a number, but for example a string
        return None
