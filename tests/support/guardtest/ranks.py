"""Runs functions of a test in several processes of one group, by default with gloo on the CPU.

    @pytest.fixture(scope="module")
    def four() -> Iterator[Ranks]:
        with Ranks(4) as ranks:
            yield ranks

    def norm_of_my_shard(scale: float) -> float:       # runs on every rank, in the default group
        ...

    def test_the_norm_is_the_same_everywhere(four):
        assert len(set(four.run(norm_of_my_shard, 3.0))) == 1

Processes are forked from a server that has imported torch once, so that a group of four starts in
half a second. They are kept for all tests of the fixture. After a failure or the death of a rank,
the group is killed, and the next call starts a new one. Functions must be top-level functions of a
file, which each rank imports by its path. Arguments and results must be picklable; tensors are sent
by value.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import math
import multiprocessing
import os
import pickle
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CALL_SECONDS = 60.0
"""Time limit of a call on all ranks."""

COLLECTIVE_SECONDS = 20.0
"""Time limit of a collective, after which torch raises."""

PATIENCE = 3.0
"""Time for which `run` waits for the other ranks after one has failed."""

# With what the first guarded step of each process would import, which takes more than a second.
_PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "torch.nn.parallel",
    "pytest",
    "fastguard.guard.guarded",
]


_LOCAL_OPS = ("wait_tensor", "_wrap_tensor_autograd")  # local ops in the namespaces of collectives


def fork_context() -> ForkServerContext:
    """Returns the context of processes that are forked from a server with the imports above."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a call on one rank.

    Attributes:
        value: Result of the function.
        error: Its traceback, if it raised.
        exitcode: Exit code of the process if it died; negative for a signal.
    """

    value: Any = None
    error: str | None = None
    exitcode: int | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return self.error
        return f"died with exit code {self.exitcode}" if self.exitcode is not None else "finished"


class Ranks:
    """A group of `world_size` processes, started by the first call.

    Args:
        world_size: The number of processes.
        collective_seconds: How long a collective waits for a rank.
        backend: Backend of torch.distributed; with "nccl", rank i uses GPU i.
    """

    def __init__(
        self,
        world_size: int,
        collective_seconds: float = COLLECTIVE_SECONDS,
        backend: str = "gloo",
    ) -> None:
        self.world_size = world_size
        self.collective_seconds = collective_seconds
        self.backend = backend
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = CALL_SECONDS, **kwargs: Any
    ) -> list[Any]:
        """Returns the results of `function(*args, **kwargs)` on each rank.

        An error, death or timeout of any rank fails the test and shows the outcome of each rank.
        """
        __tracebackhide__ = True
        outcomes = self.outcomes(function, *args, timeout=timeout, patience=PATIENCE, **kwargs)
        if any(o.error is not None or o.exitcode is not None for o in outcomes):
            said = "\n".join(f"rank {i}: {outcome}" for i, outcome in enumerate(outcomes))
            pytest.fail(f"{function.__name__} failed\n{said}", pytrace=False)
        return [o.value for o in outcomes]

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = CALL_SECONDS,
        patience: float = math.inf,
        **kwargs: Any,
    ) -> list[Outcome]:
        """Returns the outcome of the call on each rank, without raising errors or reporting deaths.

        The test fails if a rank has no outcome after `timeout` seconds, or `patience` seconds after
        the first error.
        """
        __tracebackhide__ = True
        self._start()
        call = pickle.dumps((inspect.getfile(function), function.__qualname__, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        answers = self._answers(timeout, patience)
        if len(answers) < self.world_size or any(
            o.error is not None or o.exitcode is not None for o in answers.values()
        ):
            self.kill()
        if len(answers) < self.world_size:
            silent = sorted(set(range(self.world_size)) - set(answers))
            said = "\n".join(f"rank {i}: {outcome}" for i, outcome in sorted(answers.items()))
            pytest.fail(
                f"{function.__name__}: ranks {silent} did not answer\n{said}",
                pytrace=False,
            )
        return [answers[rank] for rank in range(self.world_size)]

    def kill(self) -> None:
        """Ends all processes; the next call starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        if self._processes:
            return
        import torch.distributed as dist

        # With port 0, the system chooses a free port. The store lives as long as the group.
        self._store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        context = fork_context()
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(
                    theirs,
                    rank,
                    self.world_size,
                    self._store.port,
                    self.collective_seconds,
                    self.backend,
                ),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def _answers(self, timeout: float, patience: float) -> dict[int, Outcome]:
        deadline = time.monotonic() + timeout
        answers: dict[int, Outcome] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), timeout=left)
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    answers[rank] = Outcome(*pickle.loads(waiting[rank].recv_bytes()))
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    answers[rank] = Outcome(exitcode=self._processes[rank].exitcode)
                if answers[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + patience)
                del waiting[rank]
        return answers


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Records `(name, bytes)` of every collective of this rank within the context.

    Bytes are the size of this rank's input tensors. They are recorded in the dispatcher, which all
    collectives use, both those of c10d and the functional collectives of DTensor.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            space, name = func._schema.name.split("::")
            if space in ("c10d", "_c10d_functional") and name not in _LOCAL_OPS:
                tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
                seen.append((name, sum(t.numel() * t.itemsize for t in tensors)))
            return func(*args, **kwargs)

    with Watch():
        yield seen


def _serve(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    collective_seconds: float,
    backend: str,
) -> None:
    """The main loop of a rank: receives calls and sends outcomes until the pipe closes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
    )
    import torch
    import torch.distributed as dist

    gc.freeze()  # a full collection would traverse all imported modules, which the ranks share
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    try:
        dist.init_process_group(
            backend,
            store=dist.TCPStore("127.0.0.1", port, None, is_master=False),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_seconds),
        )
        while True:
            path, name, args, kwargs = pickle.loads(pipe.recv_bytes())
            random.seed(0)
            torch.manual_seed(0)
            answer = _called(path, name, args, kwargs)
            pipe.send_bytes(pickle.dumps(answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # exits without a collective, because other ranks may have ended


def _called(path: str, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    try:
        value = getattr(_module(path), name)(*args, **kwargs)
        pickle.dumps(value)
        return value, None
    except BaseException:
        return None, traceback.format_exc()


def _module(path: str) -> ModuleType:
    """Imports the file of a test once per process, under a private name."""
    name = f"_ranks_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
