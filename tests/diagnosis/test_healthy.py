"""`diagnose` finds no problems in healthy models, fresh or trained, in float32 or bfloat16."""

from __future__ import annotations

import pytest
import torch

from fastguard import diagnose
from fastguard.diagnosis import CHECKS
from guardtest.models import HEALTHY


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_problems(name: str, autocast: torch.dtype | None) -> None:
    model, batch, loss_fn = HEALTHY[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    context = torch.autocast("cpu", autocast) if autocast else None

    fresh = diagnose(model, batch, loss_fn, optimizer, data=[batch], autocast=context)
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        optimizer.step()
    trained = diagnose(model, batch, loss_fn, optimizer, data=[batch], autocast=context)

    for when, found in (("fresh", fresh), ("trained", trained)):
        assert found.ok, f"{when}:\n{found}"
        # Every family of checks has run.
        assert {f.check for f in found if f.severity == "ok"} == set(CHECKS)


def test_a_healthy_model_without_an_optimizer_has_no_problems() -> None:
    model, batch, loss_fn = HEALTHY["mlp"]()
    found = diagnose(model, batch, loss_fn)
    assert found.ok
    assert "AdamW(lr=0.001), because no optimizer was given" in str(found)
