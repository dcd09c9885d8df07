"""Slightly corrupted stores, archives, manifests and text files, reproducible from a seed."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickletools
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import manifest
from guardtest.fuzz_programs import joined_archives, random_program
from guardtest.fuzz_text import (
    ODD,
    changed_config,
    changed_index,
    changed_json,
    changed_steps,
    write_text_bases,
)

NUMBERS = [0, 1, 2, 7, 8, 255, 256, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
NAMES = [
    b"os\nsystem", b"builtins\neval", b"posix\nmkdir", b"subprocess\nPopen", b"torch\nSize",
    b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor_v2", b"torch\ndevice",
    b"numpy.core.multiarray\n_reconstruct", b"builtins\ngetattr", b"pathlib\nPosixPath",
    b"torch\nFloatStorage", b"torch\nfloat32", b"_codecs\nencode", b"a.b\nClass",
]  # fmt: skip


class Callable_:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def make_bases(folder: Path) -> None:
    """Writes the files and stores to corrupt into `folder`, which is empty."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "view": torch.arange(12.0).view(3, 4)[:, 1],
        "history": np.ones(5),
        "names": ("a", b"b", 1.5, None, {1, 2}),
        "whole": torch.nn.Linear(2, 2).half(),
    }
    torch.save(tree, folder / "zip.pt")
    torch.save(tree, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), folder / "plain.pt")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    write_text_bases(folder)
    write_safetensors(folder / "x.safetensors", *safetensors_parts())
    with CheckpointStore(folder / "store", keep=5) as store:
        for step in range(1, 5):
            store.save(m=model, o=optimizer, step=step, metric=1.0 / step, tag={"a": [step]})
        store.rollback(3)


def safetensors_parts() -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": {"epoch": "3"}}
    at = 0
    for name, dtype, shape, n_bytes in (
        ("a", "F32", [2, 3], 24), ("b", "BF16", [5], 10), ("n", "I64", [], 8), ("e", "F16", [0], 0),
    ):  # fmt: skip
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    return header, bytes(at)


def write_safetensors(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Corruptions. Each takes a random generator and the folder of a case with a copy of every file.

Change = Callable[[random.Random, Path], Path]


def changed_bytes(rng: random.Random, folder: Path) -> Path:
    """Flips, cuts, duplicates or overwrites bytes of a file."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        at = rng.randrange(len(raw) + 1)
        n = rng.choice([1, 2, 4, 8, 30, 300])
        kind = rng.randrange(6)
        if kind == 0 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at : at + n]
        elif kind == 2:
            raw[at:at] = raw[at : at + n]
        elif kind == 3:
            raw[at : at + n] = rng.randbytes(n)
        elif kind == 4:
            raw[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice([2, 4, 8])]
        else:
            del raw[at:]
    path.write_bytes(raw)
    return path


def changed_records(rng: random.Random, folder: Path) -> Path:
    """Rebuilds an archive with records missing, repeated, renamed or exchanged."""
    path = folder / rng.choice(["zip.pt", "plain.pt"])
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice([1, 1, 2])):
        i, j = rng.randrange(len(records)), rng.randrange(len(records))
        name, raw = records[i]
        kind = rng.randrange(6)
        if kind == 0:
            del records[i]
        elif kind == 1:
            records.insert(j, (name, rng.choice([raw, records[j][1], rng.randbytes(8)])))
        elif kind == 2:
            root, _, rest = name.partition("/")
            names = [name.upper(), rest, f"{root}/../{rest}", f"other/{rest}", f"{root}//{rest}"]
            records[i] = (rng.choice(names), raw)
        elif kind == 3:
            records[i], records[j] = (name, records[j][1]), (records[j][0], raw)
        elif kind == 4:
            records[i] = (name, raw[: rng.randrange(len(raw) + 1)] + bytes(rng.choice([0, 4])))
        else:
            records.reverse()
    rewrite(path, records, rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
    return path


def rewrite(path: Path, records: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, raw in records:
                archive.writestr(name or "x", raw)


def changed_pickle(rng: random.Random, folder: Path) -> Path:
    """Moves or repeats opcodes of a pickle, or changes their arguments."""
    paths = [folder / name for name in ("zip.pt", "plain.pt", "plain.pt", "old.pt", "old.pt")]
    paths += [*sorted(folder.rglob(".metadata")), *sorted(folder.rglob("step-*.pt"))]
    path = rng.choice(paths)
    raw = path.read_bytes()
    if raw[:2] != b"PK":
        path.write_bytes(_changed_opcodes(rng, raw, first=3 if path.name == "old.pt" else 0))
    else:
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        (name,) = [n for n in records if n.endswith("/data.pkl")]
        records[name] = _changed_opcodes(rng, records[name])
        rewrite(path, list(records.items()))
    return _unlisted(rng, path)


def _unlisted(rng: random.Random, path: Path) -> Path:
    """Removes the manifest of a store, which is then built from the changed file as well."""
    store = path.parent.parent if path.parent.suffix else path.parent
    if rng.random() < 0.8:
        (store / "manifest.json").unlink(missing_ok=True)
    return path


def _changed_opcodes(rng: random.Random, raw: bytes, first: int = 0) -> bytes:
    """Changes a stream of pickles, but not the `first` ones and not what follows them."""
    begin = io.BytesIO(raw)
    for _ in range(first):
        list(pickletools.genops(begin))
    start = begin.tell()
    places = [at for _, _, at in pickletools.genops(begin)]
    end = begin.tell()
    places = [at - places[0] + start for at in places] + [end]
    steps = [raw[a:b] for a, b in itertools.pairwise(places)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        i, j = rng.randrange(1, len(steps)), rng.randrange(1, len(steps))
        kind = rng.randrange(8)
        if kind == 0:
            del steps[i]
        elif kind == 1:
            steps.insert(i, steps[j])
        elif kind == 2:
            steps[i] = b"c" + rng.choice(NAMES) + b"\n"
        elif kind == 3:
            steps.insert(i, b"c" + rng.choice(NAMES) + b"\n" + rng.choice([b"(", b")R", b")\x81"]))
        elif kind == 4:
            steps[i : i + 1] = [steps[i]] * rng.choice([2, 10, 1000])
        elif kind == 5:
            number = rng.choice(NUMBERS)
            steps[i] = b"\x8a\x09" + number.to_bytes(9, "little")
        elif kind == 6:
            steps[i], steps[j] = steps[j], steps[i]
        else:
            steps[i] = rng.choice([b"r" + struct.pack("<I", 2**31), b"R", b"b", b"Q", b"0", b"2"])
    return raw[:start] + b"".join(steps) + raw[end:]


def changed_directory(rng: random.Random, folder: Path) -> Path:
    """Changes numbers in the headers and the directory of an archive."""
    path = rng.choice(
        [folder / "plain.pt", *sorted(folder.rglob("step-*.pt")), *sorted(folder.rglob("*.distcp"))]
    )
    raw = bytearray(path.read_bytes())
    marks = [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08"]
    places = [i for i in range(len(raw) - 4) if raw[i : i + 4] in marks]
    for _ in range(rng.choice([1, 1, 2])):
        at, size = rng.choice(places) + 4 + rng.randrange(48), rng.choice([1, 2, 4, 8])
        now = int.from_bytes(raw[at : at + size], "little")
        new = rng.choice([now + 1, now - 1, now * 2, now ^ (1 << rng.randrange(16)), *NUMBERS])
        raw[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    path.write_bytes(raw)
    return _unlisted(rng, path)


def planted_call(rng: random.Random, folder: Path) -> Path:
    """Writes a file that creates `executed` in its folder if anything in it is called."""
    called = rng.choice(
        [
            (os.mkdir, str(folder / "executed")),
            (os.system, f"touch {folder / 'executed'}"),
            (eval, f"__import__('os').mkdir({str(folder / 'executed')!r})"),
            (exec, f"open({str(folder / 'executed')!r}, 'w')"),
            (open, str(folder / "executed"), "w"),
        ]
    )
    path = folder / rng.choice(["zip.pt", "legacy.pt", "store"])
    tree = {"model": {"w": torch.ones(3)}, "objects": {}, "x": Callable_(*called)}
    if path.name == "store":
        path = rng.choice(sorted(path.glob("*.pt")))
        tree["fastguard"] = {"step": 1}
    torch.save(tree, path, _use_new_zipfile_serialization=path.name != "legacy.pt")
    return path


def changed_manifest(rng: random.Random, folder: Path) -> Path:
    """Writes a manifest with unusual values and the correct checksum."""
    path = folder / "store" / "manifest.json"
    body = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 2, 3])):
        entries = body.get("checkpoints")
        entries = entries if isinstance(entries, list) and entries else [body]
        holder = rng.choice([body, body, rng.choice(entries)])
        if not isinstance(holder, dict):
            continue
        key = rng.choice([*holder, "removing", "replaced", "file"])
        odd = rng.choice(ODD)
        kind = rng.randrange(4)
        if kind == 0:
            holder.pop(key, None)
        elif kind == 1 and isinstance(holder.get(key), list):
            holder[key] = [*holder[key], odd]
        else:
            holder[key] = odd
    if rng.random() < 0.8:
        try:
            body["sha256"] = manifest._digest(body)
        except ValueError:  # a number that JSON cannot represent
            body["sha256"] = ""
    try:
        path.write_text(json.dumps(body))
    except ValueError:
        path.write_text('{"format": "fastguard checkpoints", "version": %s}' % ("9" * 6000))
    return path


def changed_header(rng: random.Random, folder: Path) -> Path:
    """Writes a safetensors header with unusual values."""
    path = folder / "x.safetensors"
    header, data = safetensors_parts()
    for _ in range(rng.choice([1, 1, 2])):
        header = changed_json(rng, header)
    try:
        write_safetensors(path, header, data + bytes(rng.choice([0, 0, 0, 8])))
    except ValueError:
        path.write_bytes(b"")
    return path


def special_file(rng: random.Random, folder: Path) -> Path:
    """Replaces a store or a file by a link, pipe, device or folder."""
    store = folder / "store"
    last = sorted(store.glob("*.pt"))[-1]
    path = rng.choice(
        [store / ".lock", store / "manifest.json", last, store / f".tmp-{last.name}",
         store / ".tmp-manifest.json", folder / "zip.pt", folder / ".tmp-zip.pt",
         folder / "x.safetensors", last.with_name(last.name + ".replaced"),
         last.with_name("step-000000009.000009.sharded")]
    )  # fmt: skip
    if path.exists() or path.is_symlink():
        path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        places = [folder.parent / "victim", "/dev/zero", folder / "nowhere", folder / "plain.pt"]
        path.symlink_to(places[kind - 2])
    return store if path.parent == store else path


CHANGES: list[Change] = [
    changed_bytes, changed_bytes, changed_records, changed_directory, changed_directory,
    changed_pickle, changed_pickle, changed_pickle, planted_call, changed_manifest,
    changed_manifest, changed_header, changed_header, changed_index, changed_steps, changed_steps,
    changed_config, special_file, random_program, random_program, joined_archives,
]  # fmt: skip


def make_case(seed: int, bases: Path, folder: Path) -> tuple[str, Path]:
    """Creates a case in `folder`, which is replaced; returns the kind of change and the target.

    Keeps only the target and the files that links lead to, because the commands read all files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bases, folder)
    rng = random.Random(seed)
    change = rng.choice(CHANGES)
    changed = change(rng, folder)
    kept = {changed.relative_to(folder).parts[0].removeprefix(".tmp-"), "plain.pt"}
    if changed.suffix == ".json":
        kept.add("x.safetensors")
    for other in sorted(bases.iterdir()):
        if other.name not in kept and other.is_dir():
            shutil.rmtree(folder / other.name)
        elif other.name not in kept:
            (folder / other.name).unlink(missing_ok=True)
    return change.__name__, changed


def loads_finite(path: Path) -> bool:
    """Whether torch can load a file and all its values are finite."""
    try:
        tree = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    except Exception:
        return False
    return all(torch.isfinite(t).all() for t in _tensors(tree))


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, dict):
        tree = (
            [*tree, *tree.values(), *vars(tree).values()]
            if hasattr(tree, "__dict__")
            else [*tree, *tree.values()]
        )
    if isinstance(tree, list | tuple | set):
        return [t for child in tree for t in _tensors(child)]
    return []
