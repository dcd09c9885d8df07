"""Invalid arguments of `Rollback`, which raise in the constructor."""

from __future__ import annotations

import math

import pytest
import torch

from fastguard import GuardedOptimizer, Rollback


def plain_guard(**options) -> GuardedOptimizer:
    model = torch.nn.Linear(2, 1, device=options.pop("device", "cpu"))
    return GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_schedule_that_cannot_be_lowered_is_an_error() -> None:
    opt = plain_guard()
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3)
    with pytest.raises(TypeError, match=r"lr is a StepLR.*GuardedLR\(schedule\)"):
        Rollback(opt, {}, lr=schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("objects", [torch.nn.Linear(2, 1), None, ["model"]])
def test_objects_without_names_are_an_error(objects) -> None:
    with pytest.raises(TypeError, match=r"objects is a .*expected a dict.*\{'model': model\}"):
        Rollback(plain_guard(), objects)


def test_after_skips_beyond_the_limit_of_the_optimizer_is_an_error() -> None:
    opt = plain_guard(max_consecutive_skips=3)
    with pytest.raises(ValueError, match=r"after_skips=4.*max_consecutive_skips=3"):
        Rollback(opt, {}, after_skips=4)
    rollback = Rollback(opt, {}, after_skips=3)
    for _ in range(3):
        opt.step(loss=math.nan)
        rewind = rollback.step()
    assert rewind is not None and rewind.reason == "3 steps in a row were skipped"
    Rollback(opt, {}, after_skips=None, after_spikes=2)


def test_a_model_on_the_meta_device_is_an_error() -> None:
    model = torch.nn.Linear(2, 1, device="meta")
    with pytest.raises(ValueError, match=r"objects\['ema'\].*meta device.*allocate"):
        Rollback(plain_guard(), {"ema": model})
    with pytest.raises(ValueError, match=r"optimizer.*meta device.*allocate"):
        Rollback(plain_guard(device="meta"), {})
