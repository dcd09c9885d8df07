"""Configuration files that are invalid, ambiguous or made to be slow raise an error."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from pathlib import Path

import pytest

import fastguard
from fastguard import GuardConfig, SpikeRule, Threshold
from fastguard.config import sections
from guardtest import require


def test_files_that_do_not_parse_are_named(tmp_path: Path) -> None:
    require("yaml")
    for name, text in (("a.toml", "x ="), ("a.yaml", "a: [1"), ("a.ini", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            GuardConfig.from_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        GuardConfig.from_file(tmp_path / "none.toml")
    with pytest.raises(IsADirectoryError, match=r"is a folder; name the file.*guard\.toml"):
        GuardConfig.from_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "name", "write"),
    [
        ("rollback:", "rollback", "rollback: {}"),
        ("rollback: null", "rollback", "rollback: {}"),
        ("schedule: {warmup: }", "schedule.warmup", "warmup: {}"),
        ("guard:\nbatch: {}", "guard", "guard: {}"),
    ],
)
def test_an_empty_yaml_section_is_an_error(
    text: str, name: str, write: str, tmp_path: Path
) -> None:
    require("yaml")
    path = tmp_path / "guard.yaml"
    path.write_text(text)
    says = rf"guard\.yaml: {name} is empty: leave it out, or write {write} for its defaults"
    with pytest.raises(ValueError, match=says):
        GuardConfig.from_file(path)


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_file_nested_too_deeply_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"guard.{suffix}"
    path.write_text(("guard: " if suffix == "yaml" else "guard = ") + "[" * 5000)
    with pytest.raises(ValueError, match=rf"guard\.{suffix}: the values are nested too deeply"):
        GuardConfig.from_file(path)


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("guard:\n  max_norm: 1.0\nguard:\n  nonfinite: raise\n", "guard", "1 and 3"),
        ("guard:\n  max_norm: 1.0\n  max_norm: 2.0\n", "max_norm", "2 and 3"),
        ("guard: {max_norm: 1.0, 'max_norm': 2.0}", "max_norm", "1 and 1"),
        ("rollback: {}\nguard: {}\n'rollback': {every: 5}\n", "rollback", "1 and 3"),
        ("spike:\n  loss: {max: 1.0}\n  grad_norm: {max: 2.0, max: 3.0}\n", "max", "3 and 3"),
    ],
)
def test_a_repeated_section_or_key_in_yaml_is_an_error(
    text: str, name: str, lines: str, tmp_path: Path
) -> None:
    require("yaml")
    path = tmp_path / "guard.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"guard\.yaml: '{name}' appears twice, in lines {lines}"):
        GuardConfig.from_file(path)


def test_a_yaml_alias_is_not_a_repetition(tmp_path: Path) -> None:
    require("yaml")
    path = tmp_path / "guard.yaml"
    path.write_text("spike:\n  loss: &limit {max: 3.0}\n  grad_norm: *limit\n")
    assert GuardConfig.from_file(path).spike == {
        "loss": Threshold(3.0),
        "grad_norm": Threshold(3.0),
    }


@pytest.mark.parametrize("given", ["1e-6", "1e6", "-2.5e3", ".5E3"])
def test_a_number_that_yaml_reads_as_text_is_an_error_with_a_remedy(
    given: str, tmp_path: Path
) -> None:
    yaml = require("yaml")
    assert isinstance(yaml.safe_load(given), str) and isinstance(yaml.safe_load("1.0e-6"), float)
    path = tmp_path / "guard.yaml"
    for text in (
        f"schedule: {{floor: {given}}}",
        f"schedule: {{floor: [1.0, {given}]}}",
        f"guard: {{max_norm: {given}}}",
    ):
        path.write_text(text)
        with pytest.raises(TypeError, match=r"expected float; .* as in 1\.0e-6$"):
            GuardConfig.from_file(path)
    for text in ("high", "'inf'", "'0.5'"):
        path.write_text(f"guard: {{max_norm: {text}}}")
        with pytest.raises(TypeError, match=r"is of type str, expected float$"):
            GuardConfig.from_file(path)


def test_yaml_is_parsed_without_executing_it_and_may_be_empty(tmp_path: Path) -> None:
    require("yaml")
    path = tmp_path / "guard.yaml"
    path.write_text(f"guard: !!python/object/apply:os.mkdir [{tmp_path}/executed]")
    with pytest.raises(ValueError, match="not valid YAML"):
        GuardConfig.from_file(path)
    assert not (tmp_path / "executed").exists()
    path.write_text("# nothing yet")
    assert GuardConfig.from_file(path) == GuardConfig()


@pytest.mark.parametrize(
    ("section", "callee"),
    [
        (sections.GuardSection, fastguard.GuardedOptimizer),
        (sections.WarmupSection, fastguard.Warmup),
        (sections.ScheduleSection, fastguard.GuardedLR),
        (sections.RollbackSection, fastguard.Rollback),
        (sections.CheckpointSection, fastguard.CheckpointStore),
        (sections.ActivationSection, fastguard.ActivationGuard),
        (sections.RecordSection, fastguard.JsonLinesSink),
    ],
    ids=lambda x: x.__name__,
)
def test_a_section_has_the_defaults_of_the_class_it_configures(section, callee) -> None:
    parameters = inspect.signature(callee).parameters
    compared = 0
    for field in dataclasses.fields(section):
        parameter = parameters.get(field.name)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            continue
        assert field.default == parameter.default, field.name
        compared += 1
    assert compared >= 2


BOMBS = {
    "merges of merges.yaml": "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30)),
    "lists of lists.yaml": "guard:\n  max_norm: 1.0\nschedule: &a0 [1, 1]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)),
    "large.yaml": "x: [" + "1," * 100_000 + "1]",
    "large.toml": "x = [" + "1," * 100_000 + "1]",
    "dots.toml": ".".join("a" * 20_000) + " = 1",
    "not utf-8.toml": b'[guard]\nnonfinite = "sk\xef"\n',
    "escapes.toml": '["gu\\u001b[2Jard\\nok   guard.toml"]\n',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_made_to_be_slow_or_misread_is_an_error(name: str, tmp_path: Path) -> None:
    require("yaml")
    raw = BOMBS[name]
    (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    begun = time.process_time()
    with pytest.raises((TypeError, ValueError), match=name) as caught:
        GuardConfig.from_file(tmp_path / name)
    assert str(caught.value).isprintable()
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_a_pipe_or_a_device_is_an_error(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="not a regular file"):
            GuardConfig.from_file(tmp_path / f"{name}.{suffix}")


def test_merges_keep_their_meaning_and_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    yaml = require("yaml")
    path = tmp_path / "guard.yaml"
    text = (
        "spike:\n  loss: &a {window: 9, sigma: 3.0, warmup: 4}\n  a: &b {sigma: 4.0, warmup: 5}\n"
        "  b: {<<: [*a, *b], window: 8}\n  c: {window: 7, <<: *a}\n"
    )
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert GuardConfig.from_file(path) == GuardConfig.from_dict(yaml.safe_load(text))
    assert GuardConfig.from_file(path).spike["b"] == SpikeRule(window=8, sigma=3.0, warmup=4)
