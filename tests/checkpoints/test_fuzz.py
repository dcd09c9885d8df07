"""Stores, archives and manifests that were changed at random: nothing in them gains a thing.

A few hundred by default; `FASTGUARD_FUZZ=2000` takes more, and `FASTGUARD_FUZZ_SEED` others.
"""

import os

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastguard import CheckpointStore
from guardtest.fuzz_files import make_bases
from guardtest.gloo_groups import group_of_one
from guardtest.limited import run_limited

N_CASES = int(os.environ.get("FASTGUARD_FUZZ", "200"))
SEED = int(os.environ.get("FASTGUARD_FUZZ_SEED", "0"))

LOOP = """
import resource, shutil
from pathlib import Path
from guardtest.fuzz_files import loads_finite, make_case

bases, work, victim = (Path(argument) for argument in sys.argv[1:4])
first, n_cases = int(sys.argv[4]), int(sys.argv[5])
case = work / "case"
METADATA = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
            "torch.serialization", "torch", "pathlib"}  # of whose classes that of shards consists


def wrong(one, arguments, may_write):
    if one["status"] not in (0, 1, 2):
        return f"ends in {one['status']}"
    if "Traceback" in one["said"] or chr(27) in one["said"]:
        return "prints a traceback or a control character"
    for event, *paths in one["events"]:
        if event == "pickle.find_class" and paths[0] in METADATA:
            continue
        for path in paths[:1]:
            if path.isdecimal() or (event in ("os.remove", "os.rmdir") and "/" not in path):
                continue  # a descriptor; a name in a folder that is being removed
            inside = os.path.realpath(os.path.dirname(path)).startswith(str(case))
            if not may_write or not inside:
                return f"does {event} to {path}"
    if victim.read_text() != "precious" or (case / "executed").exists():
        return "changes the victim, or executes something"
    return None


seconds, n_good = 0.0, 0
for seed in range(first, first + n_cases):
    kind, path = make_case(seed, bases, case)
    store = case / "store"
    target = str(store if path.is_relative_to(store) else path)
    for arguments in (["verify", target], ["verify", str(case)], ["list", target],
                      ["rollback", target], ["verify", target]):
        one = run(["ckpt", *arguments])
        seconds = max(seconds, one["seconds"])
        problem = wrong(one, arguments, arguments[0] == "rollback")
        # A whole module, as in the other archive, is not what torch loads with weights_only=True.
        plain = path.name == "plain.pt" and kind in ("changed_records", "changed_bytes")
        if problem is None and plain and arguments == ["verify", str(path)]:
            if one["status"] == 0 and not loads_finite(path):
                problem = "is called ok, and torch cannot load it"
            n_good += one["status"] == 0
        if problem:
            print(json.dumps({"seed": seed, "kind": kind, "path": str(path), "problem": problem,
                              "arguments": arguments, "said": one["said"][:500]}), flush=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"slowest": seconds, "peak_kB": peak, "n_good": n_good}))
"""


@pytest.fixture
def bases(tmp_path):
    folder = tmp_path / "bases"
    folder.mkdir()
    make_bases(folder)
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        with CheckpointStore(folder / "shards") as store:
            for step in (1, 2):
                w = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
                store.save(m={"w": w}, step=step)
    return folder


def test_no_file_executes_anything(bases, tmp_path, capsys):
    (tmp_path / "victim").write_text("precious")
    arguments = bases, tmp_path, tmp_path / "victim", SEED, N_CASES
    found = run_limited(LOOP, tmp_path, *arguments, seconds=60 + 5 * N_CASES)
    *problems, summary = found
    with capsys.disabled():
        if N_CASES > 500:
            print(f"\n{N_CASES} cases: {summary}")
    assert not problems, "\n".join(map(str, problems))
