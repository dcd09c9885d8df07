"""Corrupted text files: indices of split models, records of a run, configurations, headers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ODD = [
    "../victim", "/etc/passwd", "", ".", "..", "link", "step-000000001.000001.pt", "\x1b[2J", "a\0",
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1.5, float("inf"), float("nan"), [], {},
    [[[[]]]], {"a": {}}, ["x"] * 1000, "9" * 6000, "nan", b"raw".decode(), "\ud800",
]  # fmt: skip

INDEX = {
    "metadata": {"total_size": 66},
    "weight_map": {"a": "x.safetensors", "b": "x.safetensors", "n": "plain.pt"},
}
HEADER = {
    "kind": "header", "fastguard": "0.1.0", "name": "run", "time": 1.5e9, "host": "node",
    "torch": "2.13", "device": "cpu", "guards": ["guarding AdamW"],
}  # fmt: skip
CONFIG = """
[guard]
max_norm = 1.0
clip_scope = "group"
[spike.loss]
window = 64
[groups."latents.*"]
max_norm = 0.5
[schedule.warmup]
steps = 10
"""
YAML = """
guard: &g {max_norm: 1.0, clip_scope: group, nonfinite: skip}
spike:
  loss: &rule {window: 64, sigma: 5.0, warmup: 8}
  grad_norm: {<<: *rule, action: clip}
records: {jsonl: "x.jsonl", name: 'run'}
"""


def write_text_bases(folder: Path) -> None:
    """Writes an index, a file of records and two configurations."""
    (folder / "x.safetensors.index.json").write_text(json.dumps(INDEX))
    lines = [HEADER, *map(_step, range(1, 20))]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "guard.toml").write_text(CONFIG)
    (folder / "guard.yaml").write_text(YAML)


def _step(step: int) -> dict[str, Any]:
    bad = step % 5 == 0
    return {
        "step": step,
        "total_norm": "NaN" if bad else 1.0 / step,
        "clip_coef": 1.0,
        "action": "skipped" if bad else "applied",
        "reason": "nonfinite_grad" if bad else None,
        "culprits": [["head.weight", 1, 0, 0]] if bad else [],
        "n_culprits": int(bad),
        "losses": {"loss": 2.0 / step, "aux": 1},
        "lr": 0.1,
        "time": 1.5e9 + step,
        "tag": {"epoch": 1},
        "watch": {"tensor_norms": {"a.weight": 1.0}} if step % 7 == 0 else {},
    }


def changed_json(rng: random.Random, value: Any) -> Any:
    """Returns a JSON value in which one part, at any depth, is replaced, removed or repeated."""
    inside = isinstance(value, dict | list) and value and rng.random() < 0.8
    if not inside:
        kind = rng.randrange(4)
        if kind == 0 and isinstance(value, str):
            return value + rng.choice(
                ["\x1b[2J", "<a href='javascript:1'>", "\u202e", "%{x}\n", "/.."]
            )
        if kind == 1:
            return [value] * rng.choice([2, 100])
        return rng.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    value = value.copy()
    kind = rng.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[str(rng.choice(ODD))] = value.pop(key)
    else:
        value[key] = changed_json(rng, value[key])
    return value


def changed_text(rng: random.Random, text: str) -> str:
    """Returns a text in which tokens are removed, repeated, exchanged or replaced."""
    tokens = [text[i : i + n] for i, n in _tokens(rng, text)]
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        kind = rng.randrange(5)
        if kind == 0:
            tokens[i] = ""
        elif kind == 1:
            tokens[i] *= rng.choice([2, 3, 100, 2000])
        elif kind == 2:
            tokens[i], tokens[j] = tokens[j], tokens[i]
        elif kind == 3:
            tokens[i] = str(rng.choice(ODD))
        else:
            tokens[i] += rng.choice(
                [
                    "[",
                    "{",
                    '"',
                    "&a ",
                    "*g",
                    "<<: *g",
                    "!!python/name:os.system",
                    "\n",
                    "\x1b",
                    "é",
                    ":",
                ]
            )
    return "".join(tokens)


def _tokens(rng: random.Random, text: str) -> list[tuple[int, int]]:
    places, at = [], 0
    while at < len(text):
        n = rng.choice([1, 2, 5, 12])
        places.append((at, n))
        at += n
    return places


def changed_index(rng: random.Random, folder: Path) -> Path:
    """Writes an index with unusual names and values, or removes a file that it names."""
    path = folder / "x.safetensors.index.json"
    if rng.random() < 0.1:
        (folder / rng.choice(["x.safetensors", "plain.pt"])).unlink()
    else:
        write_json(path, changed_json(rng, INDEX))
    return path


def changed_steps(rng: random.Random, folder: Path) -> Path:
    """Writes records with unusual values, or changes their text."""
    path = folder / "steps.jsonl"
    lines = path.read_text().splitlines()
    for _ in range(rng.choice([1, 3, 10])):
        i = rng.randrange(len(lines))
        if rng.random() < 0.7 and lines[i].startswith("{"):
            try:
                lines[i] = json.dumps(changed_json(rng, json.loads(lines[i])))
            except (ValueError, RecursionError):
                lines[i] = "9" * 6000
        else:
            lines[i] = changed_text(rng, lines[i] or "x").replace("\n", " ")
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return path


def changed_config(rng: random.Random, folder: Path) -> Path:
    """Changes the text of a configuration."""
    path = folder / rng.choice(["guard.toml", "guard.yaml"])
    text = changed_text(rng, path.read_text())
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value))
    except ValueError:  # a number of too many digits
        path.write_text('{"weight_map": %s}' % ("9" * 6000))
