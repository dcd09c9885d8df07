"""Reads numpy arrays that are stored in the pickle itself, if their numbers can be checked.

Plain numbers become a tensor, as does each field of a structured array. Arrays that cannot be
checked (objects, number types of another machine) are reported as unread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.inert_values import LongBytes, Name

_PLAIN = frozenset(
    "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()
)  # types that torch has too, or that can be cast to one
_LONG = f"f{np.dtype(np.longdouble).itemsize}", f"c{np.dtype(np.clongdouble).itemsize}"
_NO_NUMBERS = "USMm"  # kinds without NaN and Inf: text, bytes, times
_MAX_FIELDS = 1000  # including fields of nested structures
_DEEPEST = 20  # nested structures
_LARGEST = 1 << 24  # bytes per element; a piece of an array holds at least one


class NumpyDtype:
    """A pickled `numpy.dtype`.

    Attributes:
        plain: The dtype, if it is numeric or has fields; None if unknown.
        what: The name of the dtype in messages.
        holds_numbers: Whether values of the dtype can be NaN.
    """

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.what: str = (
            code if isinstance(code, str) else repr(code) if isinstance(code, Name) else "?"
        )
        self.what = self.what[:40]
        kind = self.what[:1]
        self.holds_numbers: bool = kind not in _NO_NUMBERS
        self.plain: np.dtype | None = None
        self.of_torch: torch.dtype | None = None
        self.n_fields: int = 1
        self.depth: int = 0
        if isinstance(code, Name):  # ml_dtypes.bfloat16 and similar, which torch has too
            found = getattr(torch, self.what.rpartition(".")[2], None)
            self.of_torch = found if isinstance(found, torch.dtype) else None
        elif self.what in _PLAIN or self.what in _LONG:
            self.plain = np.dtype(self.what)

    @property
    def itemsize(self) -> int:
        """Size of an element in bytes; 0 if unknown."""
        found = self.plain if self.plain is not None else self.of_torch
        return 0 if found is None else found.itemsize

    def __repr__(self) -> str:
        return f"numpy {self.what}"

    def set_state(self, state: Any, _charge: Callable[[int], None]) -> None:
        """Handles the BUILD opcode: sets the pickled state of the dtype."""
        _version, order, _subarray, names, fields, size, *_ = state
        if self.plain is not None and order in ("<", ">", "="):
            self.plain = self.plain.newbyteorder(order)
        elif isinstance(names, tuple) and isinstance(fields, dict):
            self.what = "structured"
            parts = [fields[name] for name in names[:_MAX_FIELDS]]
            inner = [part[0] for part in parts if isinstance(part[0], NumpyDtype)]
            self.n_fields = 1 + sum(dtype.n_fields for dtype in inner)
            self.depth = 1 + max((dtype.depth for dtype in inner), default=0)
            fits = self.n_fields <= _MAX_FIELDS and self.depth <= _DEEPEST
            self.plain = _structured(parts, size) if fits and len(inner) == len(names) else None


def _structured(parts: list[Any], size: Any) -> np.dtype | None:
    """Returns the dtype of a structured array; None if part of it cannot be read."""
    if not parts or type(size) is not int or not 0 < size <= _LARGEST:
        return None
    formats, offsets = [], []
    for dtype, offset, *_ in parts:
        if dtype.plain is None or type(offset) is not int:
            return None
        formats.append(dtype.plain)
        offsets.append(offset)
    if sum(dtype.itemsize for dtype in formats) > size:  # overlapping fields multiply the work
        return None
    plain = [str(i) for i in range(len(parts))]  # field titles and names are not needed
    return np.dtype({"names": plain, "formats": formats, "offsets": offsets, "itemsize": size})


class NumpyArray:
    """A pickled ndarray.

    Attributes:
        shape: As in numpy.
        unread: Description of the values that cannot be checked; None if all values can be checked.
    """

    def __init__(self, *, is_masked: bool = False) -> None:
        self._is_masked = is_masked
        self.shape: tuple[int, ...] = ()
        self.unread: str | None = None
        self._dtype: NumpyDtype | None = None
        self._raw: bytes | LongBytes = b""

    def set_state(self, state: Any, charge: Callable[[int], None]) -> None:
        """Handles the BUILD opcode: sets the pickled state of the array."""
        _version, shape, dtype, _fortran, raw, *_mask = state
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise DamagedFile("damaged: a numpy array with an invalid shape")
        if not isinstance(dtype, NumpyDtype):
            raise DamagedFile("damaged: a numpy array without a dtype")
        n = math.prod(shape[:64])
        self.shape, self._dtype, self._raw = shape[:64], dtype, b""
        if not dtype.holds_numbers or n == 0:
            return
        if self._is_masked:  # values under the mask are often NaN
            self.unread = f"masked numpy array of dtype {dtype.what}"
            return
        if not dtype.itemsize or not isinstance(raw, bytes | LongBytes):
            self.unread = f"numpy array of dtype {dtype.what}"
            return
        if n * dtype.itemsize != len(raw):
            raise DamagedFile(
                f"damaged: a numpy array of shape {list(shape)[:8]} has {len(raw)} bytes"
            )
        charge(len(raw) if isinstance(raw, bytes) else 0)
        self._raw = raw

    @property
    def is_floating(self) -> bool:
        """Whether the numbers could be weights."""
        if self._dtype is None or not len(self._raw):
            return False
        return self._dtype.of_torch is not None or self._dtype.plain.kind in "fcV"  # type: ignore[union-attr]

    @property
    def start(self) -> int | None:
        """Byte of the file at which the numbers begin, if they were left in the file."""
        return self._raw.start if isinstance(self._raw, LongBytes) else None

    @property
    def is_readable(self) -> bool:
        """Whether the array has numbers that can be checked."""
        return len(self._raw) > 0

    def pieces(self, read: Callable[[LongBytes], Iterator[bytes]]) -> Iterator[Tensor]:
        """Yields the numbers in pieces of a few megabytes.

        Args:
            read: Reads values that were left in the file.
        """
        if isinstance(self._raw, bytes):
            if self._raw:
                yield from self._parts(self._raw)
            return
        itemsize = self._dtype.itemsize  # type: ignore[union-attr]
        rest = b""
        for more in read(self._raw):
            rest += more
            whole = len(rest) // itemsize * itemsize
            yield from self._parts(rest[:whole])
            rest = rest[whole:]

    def _parts(self, raw: bytes) -> Iterator[Tensor]:
        dtype = self._dtype
        assert dtype is not None
        if dtype.of_torch is not None:
            empty = torch.empty(0, dtype=torch.uint8, device="cpu")
            data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else empty
            yield data.view(dtype.of_torch)
        elif dtype.plain is not None:
            yield from _tensors(np.frombuffer(raw, dtype.plain))


def _tensors(values: np.ndarray) -> Iterator[Tensor]:
    if values.dtype.names is not None:
        for name in values.dtype.names:  # at most 1000 fields in total, and 20 levels
            yield from _tensors(values[name])
        return
    if values.dtype.itemsize > 8 and values.dtype != np.complex128:  # extended precision
        parts = [values] if values.dtype.kind == "f" else [np.real(values), np.imag(values)]
        for part in parts:  # a cast to float64 could overflow, so finite values become 0
            with np.errstate(invalid="ignore"):
                yield torch.from_numpy(np.where(np.isfinite(part), 0.0, part).astype(np.float64))
        return
    yield torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("=")))


def numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """Returns the value of a numpy scalar, or an array if Python has no such number."""
    if not isinstance(dtype, NumpyDtype):
        return None
    plain = dtype.plain
    if plain is None or plain.kind not in "biuf" or not isinstance(raw, bytes):
        return array_from_buffer(raw, dtype, ())
    found = np.frombuffer(raw, plain, count=1)[0]
    return float(found) if plain.kind == "f" else found.item()


def array_from_buffer(buffer: Any, dtype: Any, shape: Any, _order: Any = "C", *_: Any) -> Any:
    """Builds the array that protocol 5 describes."""
    made = NumpyArray()
    made.set_state((1, shape, dtype, False, buffer), lambda _: None)
    return made


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_OF_PYTHON = {"f": "<f4", "d": "<f8", 14: "<f4", 15: ">f4", 16: "<f8", 17: ">f8"}
"""Dtypes of a Python `array`, by its type code and by the `mformat_code` of its pickle."""


def python_array(code: Any, values: Any = ()) -> NumpyArray:
    """Builds the placeholder for an `array.array`; only floats are checked.

    Args:
        code: A key of `_OF_PYTHON`.
        values: The numbers of the array, or their bytes.
    """
    made = NumpyArray()
    if isinstance(code, str | int) and code in _OF_PYTHON:
        dtype = NumpyDtype(_OF_PYTHON[code][1:])
        dtype.plain = np.dtype(_OF_PYTHON[code])
        if not isinstance(values, bytes | LongBytes):
            # Lists in lists are refused, since numpy would copy a list once per occurrence.
            if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
                raise DamagedFile("damaged: an array of something other than numbers")
            values = np.array(values, dtype.plain).tobytes()
        shape = (len(values) // dtype.itemsize,)
        made.set_state((1, shape, dtype, False, values), lambda _: None)
    return made
