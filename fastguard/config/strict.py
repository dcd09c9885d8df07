"""Builds dataclasses from nested mappings, and checks every key and type.

An unknown key raises an error that names the most similar valid key; a value of the wrong type
raises an error too. A nested mapping becomes the dataclass that is the type of its field.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastguard.errors import nearest
from fastguard.errors.checked_numbers import number_of
from fastguard.errors.plain_text import shown
from fastguard.records.regular_files import open_regular
from fastguard.stages.spike_rules import SpikeRule, Threshold

WITH_EXPONENT = re.compile(r"[-+]?[\d.]+e[-+]?\d+", re.IGNORECASE)
YAML_TEXT = "; YAML reads this number as a string: write it with a point and a sign, as in 1.0e-6"

_LARGEST = 1 << 17  # bytes; a limit, since PyYAML takes 20 µs for a value of two bytes
_MAX_DOTS = 1000  # dots per line; tomllib takes quadratic time for keys such as `a.a.a = 1`
_TOO_DEEP = "the values are nested too deeply for a configuration"

T = TypeVar("T")


def parse(text: str, suffix: str) -> Any:
    """Parses a TOML or YAML text into nested values.

    Args:
        text: The contents of the file.
        suffix: The suffix of the file: `.toml`, `.yaml` or `.yml`.

    Raises:
        ValueError: The text cannot be parsed, or `suffix` is unknown.
        ImportError: YAML support is not installed.
    """
    try:
        return _parse(text, suffix)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def read_text(path: Path) -> str:
    """Returns the text of a configuration file, in UTF-8.

    Raises:
        ValueError: The file is not text in UTF-8, or is too large for a configuration.
        OSError: The file cannot be read, or is a pipe or a device.
    """
    with open_regular(path) as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError(f"{path} is larger than {_LARGEST:,} bytes, too large for a configuration")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is invalid") from None


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        if max(line.count(".") for line in text.split("\n")) > _MAX_DOTS:
            raise ValueError(_TOO_DEEP)
        return tomllib.loads(text)
    if suffix not in (".yaml", ".yml"):
        raise ValueError(f"a configuration file must end in .toml, .yaml or .yml, not {suffix!r}")
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "YAML support is not installed; run: pip install 'torch-fastguard[yaml]', or use TOML"
        ) from error

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            """Merges the mappings of `<<`, and keeps one value per key.

            PyYAML keeps all values until the mapping is built, so nested merges (ten copies of ten
            copies, and so on) would take unbounded memory.
            """
            super().flatten_mapping(node)
            last = {(k.tag, k.value) if k.id == "scalar" else k: (k, v) for k, v in node.value}
            node.value = list(last.values())

    try:
        loader = Loader(text)
        root = loader.get_single_node()
        _refuse_repeated_keys(root)
        return loader.construct_document(root) or {} if root is not None else {}
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {shown(error, 500, str)}") from None


def _refuse_repeated_keys(root: Any) -> None:
    """Raises a ValueError if a mapping in a composed YAML document repeats a key.

    PyYAML would silently keep the last value; a TOML parser raises an error by itself.
    """
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue  # the node is a scalar, an empty document, or an alias of a visited node
        seen.add(id(node))
        if node.id == "sequence":
            pending += node.value
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            pending += (key, value)
            if key.id != "scalar":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            first = lines.pop(name, None)
            lines[name] = line
            if first is not None:
                raise ValueError(
                    f"{shown(key.value)} appears twice, in lines {first} and {line}; YAML would "
                    "keep only the last entry; merge these entries into one"
                )


def build(cls: type[T], settings: Any, path: str) -> T:
    """Builds a dataclass from a mapping, checking every key and type.

    Args:
        cls: The dataclass.
        settings: The values by field name.
        path: The path in error messages, `"schedule.warmup"`; `""` for the whole configuration.

    Raises:
        ValueError: A key is unknown or missing, or a value is out of range.
        TypeError: A value has the wrong type.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"{path or 'the configuration'} must hold settings, not {shown(settings)}")
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = {k: hint for k, hint in typing.get_type_hints(cls).items() if k in fields}
    for key in settings:
        if key not in hints:
            raise ValueError(f"unknown setting {_join(path, key)}{nearest(str(key), hints)}")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if not has_default and f.name not in settings:
            raise ValueError(f"{_join(path, f.name)} is missing")
    checked = {key: _check(v, hints[key], _join(path, key)) for key, v in settings.items()}
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def refuse_empty_sections(cls: type, settings: Any, path: str = "") -> None:
    """Raises an error for empty sections of a file.

    A YAML file yields None for an empty section, which would disable the feature.

    Args:
        cls: The dataclass for the settings.
        settings: The settings as read.
        path: The path in error messages.

    Raises:
        ValueError: A section is empty.
    """
    hints = typing.get_type_hints(cls)
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        hint = hints.get(key)
        kinds = [h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)]
        if len(kinds) != 1:
            continue
        where = _join(path, key)
        if value is None:
            raise ValueError(
                f"{where} is empty: leave it out, or write {key}: {{}} for its defaults"
            )
        refuse_empty_sections(kinds[0], value, where)  # type: ignore[arg-type]


def _check(value: Any, hint: Any, path: str) -> Any:
    """Returns a value of the requested type.

    Only integers (to float) and containers are converted.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _check_any(value, args, path)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path}={shown(value)} must be one of {', '.join(map(repr, args))}")
        return value
    if origin is list and isinstance(value, list):
        return [_check(v, args[0], f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_check(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{path} must hold settings by name, not {shown(value)}")
        return {str(k): _check(v, args[1], _join(path, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return number_of(path, value)
    if isinstance(hint, type) and isinstance(value, hint):
        if not isinstance(value, bool) or hint is bool:
            return value
    name = getattr(hint, "__name__", str(hint))
    raise TypeError(
        f"{path}={shown(value)} is of type {type(value).__name__}, expected {name}"
        + (YAML_TEXT if hint is float and WITH_EXPONENT.fullmatch(str(value)) else "")
    )


def _check_any(value: Any, hints: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    hints = tuple(h for h in hints if h is not type(None))
    if set(hints) == {SpikeRule, Threshold}:
        if not (isinstance(value, Mapping) and "max" in value):
            return build(SpikeRule, value, path)
        relative = {f.name for f in dataclasses.fields(SpikeRule)} - {"action"}
        both = ", ".join(str(key) for key in value if key in relative)
        if both:
            raise ValueError(
                f"{path} has max, a setting of Threshold, and {both} of SpikeRule; remove one of "
                "the two"
            )
        return build(Threshold, value, path)
    if len(hints) == 1:
        return _check(value, hints[0], path)
    rules = {h.__name__: h for h in hints if isinstance(h, type) and dataclasses.is_dataclass(h)}
    if rules and isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("rule", None)
        if name not in rules:
            raise ValueError(f"{path}.rule={shown(name)} must be one of {', '.join(rules)}")
        return build(rules[name], settings, path)  # type: ignore[arg-type]
    container = next((kind for kind in (list, dict) if isinstance(value, kind)), None)
    for hint in hints:
        origin = typing.get_origin(hint)
        if container is (origin if origin in (list, dict) else None):
            return _check(value, hint, path)
    raise TypeError(f"{path}={shown(value)} is of type {type(value).__name__}")


def _join(path: str, key: object) -> str:
    name = shown(key, 200, str)
    return f"{path}.{name}" if path else name
