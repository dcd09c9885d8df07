"""Random changes to stores, archives and text files never lead to executed code or false results.

By default a few hundred changes are tested. `FASTGUARD_FUZZ=2000` tests more, and
`FASTGUARD_FUZZ_SEED` selects others.
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
from fastguard import GuardConfig
from guardtest.fuzz_files import loads_finite, make_case

fastguard_main = main


def main(arguments):
    if arguments[0] != "config":
        return fastguard_main(arguments)
    try:
        GuardConfig.from_file(arguments[1])
    except (TypeError, ValueError, OSError) as error:
        print(error)
        return 1
    return 0


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


def commands(path):  # to run on a case
    if path.suffix == ".jsonl":
        return [["report", str(path), "--out", str(case / "out")], ["monitor", "--once", str(path)]]
    if path.suffix in (".toml", ".yaml"):
        return [["config", str(path)]]
    store = next((p for p in path.parents if p.parent == case), path)
    target = str(path if store == path else store)
    return [["ckpt", *arguments] for arguments in
            (["verify", target], ["verify", str(case)], ["verify", str(path)], ["list", target],
             ["rollback", target], ["verify", target])]


def disagrees(path, one):  # ok, but torch cannot load it by default
    is_noted = "weights_only=True) refuses" in one["said"]
    if path.name not in ("plain.pt", "old.pt") or one["status"] != 0 or is_noted:
        return False
    return not loads_finite(path)


for name in ("steps.jsonl", "guard.toml", "guard.yaml"):  # what is imported when it is needed
    case.mkdir(exist_ok=True)
    for arguments in commands(bases / name):
        assert run(arguments)["status"] in (0, 1)
seconds, n_good = 0.0, 0
for seed in range(first, first + n_cases):
    kind, path = make_case(seed, bases, case)
    for arguments in commands(path):
        one = run(arguments)
        seconds = max(seconds, one["seconds"])
        problem = wrong(one, arguments, arguments[1] == "rollback" or "--out" in arguments)
        if problem is None and arguments[:2] == ["ckpt", "verify"]:
            n_good += one["status"] == 0
            if arguments[2] == str(path) and disagrees(path, one):
                problem = "is called ok, and torch cannot load it"
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
