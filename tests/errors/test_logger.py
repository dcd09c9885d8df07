"""Output on stderr, with and without configured logging."""

import os
import pty

import pytest

from guardtest.programs import run_program

GUARD = """
import torch, fastguard
p = torch.nn.Parameter(torch.zeros(2))
inner = torch.optim.SGD([p], lr=0.1)
for _ in range(2):  # the second guard of an optimizer prints nothing
    opt = fastguard.GuardedOptimizer(inner, max_norm=2.5)
p.grad = torch.tensor([float("nan"), 1.0])
opt.step(tag="x" * 300)
"""


def stderr_of(setup: str = "") -> list[str]:
    done = run_program(setup + GUARD, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_without_configured_logging_the_guard_and_each_incident_are_printed():
    start, incident = stderr_of()
    assert start.startswith("fastguard: guarding SGD: 1 tensors, 2 elements on cpu")
    assert incident.startswith("fastguard: step 1 skipped because of nonfinite_grad")
    assert len(incident) == 120 and incident.endswith("…")


QUIET = {
    "a level of the logger": 'import logging; logging.getLogger("fastguard").setLevel("WARNING")',
    "basicConfig": "import logging; logging.basicConfig()",
    "a later rank": (
        "import tempfile, torch.distributed as dist; "
        "from torch.testing._internal.distributed.fake_pg import FakeStore; "
        'dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())'
    ),
}


@pytest.mark.parametrize("case", QUIET)
def test_the_announcement_respects_the_log_level(case):
    (incident,) = stderr_of(QUIET[case] + "\n")
    assert "fastguard: step 1 skipped" in incident


def test_a_handler_of_the_program_replaces_the_default_output():
    setup = (
        "import logging; logging.basicConfig(level='INFO', format='[%(levelname)s] %(message)s')"
    )
    start, incident = stderr_of(setup)
    assert start.startswith("[INFO] fastguard: guarding SGD")
    assert incident.startswith("[WARNING] fastguard: step 1 skipped")
    assert stderr_of("import logging; logging.lastResort = None") == []


def on_a_terminal(**environment: str) -> str:
    leader, follower = pty.openpty()
    env = {"TERM": "xterm", **environment}
    run_program(GUARD, env=env, terminal=os.ttyname(follower), check=True)
    os.close(follower)
    text = b""
    try:
        while part := os.read(leader, 4096):
            text += part
    except OSError:  # Linux raises when the other end is closed
        pass
    os.close(leader)
    return text.decode()


def test_colors_are_used_if_the_terminal_supports_them():
    text = on_a_terminal()
    assert "\x1b[33mfastguard:\x1b[0m step 1 skipped" in text
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(TERM="dumb")
