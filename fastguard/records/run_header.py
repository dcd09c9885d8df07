"""The header of a file of records: one line that describes the program that wrote the records.

    {"kind": "header", "fastguard": "0.1.0", "name": "gpt-small", "time": 1764540000.0,
     "python": "3.11.2", "torch": "2.13.0", "triton": "3.4.0", "host": "node7",
     "device": "cuda:0 NVIDIA H100", "guards": ["guarding AdamW: 75 tensors, ..."]}

Every file begins with a header. A process that appends to an existing file writes another header
before its first record. Readers of records skip headers, which have a `"kind"`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastguard.errors.plain_text import printable
from fastguard.records.strict_json import encode, shortened

if TYPE_CHECKING:
    import torch

KIND = "header"

MAX_TEXT_LENGTH = 2000
"""Maximum number of characters of a value when a header is read."""

# the second form occurs if another program rewrote the file
_STARTS = (b'{"kind": "header"', b'{"kind":"header"')
_GUARDS = 16  # maximum number of guards read
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm")  # names of Triton's distributions


@dataclass(frozen=True, slots=True)
class RunHeader:
    """The header of a run. All text is printable and bounded in length; None: not in the file.

    Attributes:
        fastguard, python, torch, triton: Versions.
        name: Name of the run, as given to the sink.
        time: When the sink was created, in Unix seconds.
        host: Name of the machine.
        device: Device of the guard's decisions.
        guards: `GuardedOptimizer.describe()` of each optimizer whose records the file holds.
    """

    fastguard: str
    name: str | None = None
    time: float | None = None
    python: str | None = None
    torch: str | None = None
    triton: str | None = None
    host: str | None = None
    device: str | None = None
    guards: tuple[str, ...] = ()

    def versions(self) -> str:
        """Returns the versions in one line.

        Example:
            >>> RunHeader("0.1.0", python="3.11.2", torch="2.13.0").versions()
            'fastguard 0.1.0, torch 2.13.0, Python 3.11.2'
        """
        found = {
            "fastguard": self.fastguard,
            "torch": self.torch,
            "triton": self.triton,
            "Python": self.python,
        }
        return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def header_line(
    *, name: str | None, time: float, host: bool, device: str | None, guards: Sequence[str]
) -> bytes:
    """Returns the line of a header, with its newline.

    Args:
        name: Name of the run.
        time: Unix seconds.
        host: Whether to include the name of this machine.
        device: See `RunHeader`.
        guards: See `RunHeader`.
    """
    import torch  # imported here, because commands that only read records start without torch

    from fastguard import __version__

    fields = {
        "kind": KIND,
        "fastguard": __version__,
        "name": name,
        "time": time,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version(*TRITON),
        "host": platform.node() if host else None,
        "device": device,
        "guards": list(guards),
    }
    return (encode(shortened(fields)) + "\n").encode()


def begins_as_header(line: bytes) -> bool:
    """Whether a line looks like a header, without parsing it."""
    return line.startswith(_STARTS)


def is_header(value: Any) -> bool:
    """Whether a JSON value is a header.

    Example:
        >>> is_header({"kind": "header", "fastguard": "0.1.0"}), is_header({"kind": "header"})
        (True, False)
    """
    return (
        isinstance(value, dict)
        and value.get("kind") == KIND
        and isinstance(value.get("fastguard"), str)
    )


def parse_header(line: bytes | str) -> RunHeader | None:
    """Returns the header in a line; None if the line is no header."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return header_of(value) if is_header(value) else None


def header_of(value: dict[str, Any]) -> RunHeader:
    """Returns a header; fields of another type than expected are None.

    Example:
        >>> header_of({"kind": "header", "fastguard": "0.1.0", "name": 7, "time": 5.5}).time
        5.5
    """
    texts = {
        key: printable(value[key], MAX_TEXT_LENGTH)
        for key in ("fastguard", "name", "python", "torch", "triton", "host", "device")
        if isinstance(value.get(key), str)
    }
    time, guards = value.get("time"), value.get("guards")
    if not (isinstance(time, int | float) and 0 <= time < 1 << 53):
        time = None
    return RunHeader(
        time=None if time is None else float(time),
        guards=tuple(
            printable(guard, MAX_TEXT_LENGTH)
            for guard in (guards[:_GUARDS] if isinstance(guards, list) else ())
            if isinstance(guard, str)
        ),
        **texts,
    )


def device_text(device: torch.device) -> str:
    """Returns the name of a device; for CUDA with the model of the GPU. Does not synchronize."""
    if device.type != "cuda":
        return str(device)
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}"


def installed_version(*distributions: str) -> str | None:
    """Returns the version of the first distribution that is installed; None if none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        # an OSError is raised, for example, if no descriptor is free
        except (metadata.PackageNotFoundError, OSError):
            continue
    return None
