"""The path of a gradient through the package, which CONTRIBUTING.md describes."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fastguard
from fastguard.gradients.buckets import GradBucket, GradBuckets

PACKAGE = Path(fastguard.__file__).parent
LONGEST_PATH = 12


def described_path() -> set[str]:
    """Returns the files that CONTRIBUTING.md names in the paragraph about the path."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (paragraph,) = (part for part in text.split("\n\n") if part.startswith("**The path of one"))
    return set(re.findall(r"`((?!tests)[\w/]+\.py)`", paragraph))


class Followed:
    """Collects the files of functions that hold a gradient, a view of it, or a bucket of it."""

    def __init__(self, grads: Iterable[torch.Tensor]) -> None:
        self.files: set[str] = set()
        self._storages = {grad.untyped_storage().data_ptr() for grad in grads}

    def __call__(self, frame: FrameType, event: str, result: Any) -> Any:
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(PACKAGE):
            return None
        if event == "return" and any(map(self._is_held_by, [*frame.f_locals.values(), result])):
            self.files.add(file.relative_to(PACKAGE).as_posix())
        return self

    def _is_held_by(self, value: object) -> bool:
        if isinstance(value, torch.Tensor):
            return value.untyped_storage().data_ptr() in self._storages
        if isinstance(value, list | tuple):
            return any(map(self._is_held_by, value))
        return isinstance(value, GradBucket | GradBuckets)


# Joined, of medium size, and split and read in rows.
@pytest.mark.parametrize("width", [20, 200, 1100])
def test_a_gradient_passes_at_most_twelve_files_and_all_are_described(width):
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 3))
    opt = fastguard.GuardedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1e-3)

    def backward() -> None:
        opt.zero_grad()
        model(torch.randn(4, width)).sum().backward()

    backward()
    opt.step()  # the next step recognizes its layout
    backward()
    path = Followed(p.grad for p in model.parameters())
    before = sys.gettrace()
    sys.settrace(path)
    try:
        opt.step()
    finally:
        sys.settrace(before)
    assert opt.records()[-1].action == "clipped"
    assert path.files <= described_path()
    assert {"guard/guarded.py", "stages/cpu/measure.py", "stages/cpu/apply.py"} <= path.files
    assert len(path.files) <= LONGEST_PATH
