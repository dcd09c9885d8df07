"""Runs of incident B that a signal ends: `python killed_classifier.py FOLDER`.

Each run is a forked child that sends the signal to itself in the middle of epoch 5. Forking avoids
importing torch again. The script prints the exit statuses and the batch as JSON.
test_b_classifier.py runs it.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

# The first optimizer imports it; importing it here does so once for all children.
import torch._dynamo

from fastguard.commands.demo.incidents.classifier import BATCHES, AsItWas, Guarded
from fastguard.commands.demo.incidents.plain_loop import quiet_one_thread

BATCH = 4 * BATCHES + 20
RUNS = {
    "as-it-was": (AsItWas, signal.SIGTERM),
    "terminated": (Guarded, signal.SIGTERM),
    "killed": (Guarded, signal.SIGKILL),
}


def ended(way, folder, number):
    """The exit status of a run that gets a signal before `BATCH`."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with quiet_one_thread():
            way(folder).train(lambda batch: batch == BATCH and os.kill(os.getpid(), number))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    statuses = {}
    for name, (way, number) in RUNS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        statuses[name] = ended(way, folder, number)
    print(json.dumps({"batch": BATCH, "statuses": statuses}))
