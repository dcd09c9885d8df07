"""A run is killed in its middle and resumes from its last verified checkpoint, bit for bit.

Run it without arguments: it starts itself twice as a training process, kills the first one, and
compares the result with a run that was not interrupted.
"""

import signal
import subprocess
import sys
from pathlib import Path

import torch

import fastguard

STEPS = 40


def train(folder: str, killed_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1)
    )
    opt = fastguard.GuardedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
    objects = {"model": model, "optimizer": opt}
    with fastguard.CheckpointStore(folder, keep=2) as store:
        step = store.load("last-clean", objects).step if store.list() else 0
        print(f"start after step {step}", flush=True)
        while step < STEPS:
            step += 1
            loss = model(torch.randn(16, 8)).square().mean()
            loss.backward()
            opt.step(loss=loss, tag=step)
            opt.zero_grad()
            store.maybe_save(objects, step=step, every=10)
            if step == killed_at:
                signal.raise_signal(signal.SIGKILL)
    return model[0].weight.detach()


def in_a_process(folder: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, __file__, folder, *arguments]).returncode


if __name__ == "__main__" and len(sys.argv) > 1:
    train(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
elif __name__ == "__main__":
    assert in_a_process("interrupted", "25") != 0  # the first process dies in step 25
    assert in_a_process("interrupted") == 0  # the second resumes after step 20
    train("uninterrupted")

    weights = []
    for folder in ("interrupted", "uninterrupted"):
        with fastguard.CheckpointStore(Path(folder), read_only=True) as store:
            assert store.last().clean and store.last().step == STEPS
            weights.append(store.load("last").state["model"]["0.weight"])
    assert torch.equal(*weights)
    print("the resumed run and the uninterrupted one have the same weights")
