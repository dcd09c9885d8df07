"""Losses passed to a guarded step, to `observe`, or returned by a closure."""

import math
import weakref

import pytest
import torch

from guardtest.guarded import one

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("mode", ["skip", "zero"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_nonfinite_loss_skips_regardless_of_the_gradients(mode, bad):
    p, opt = one(1.0, nonfinite=mode)
    opt.step(loss=torch.tensor(bad))
    record = opt.records()[0]
    assert p.item() == 0.0
    assert (record.action, record.reason) == ("skipped", "nonfinite_loss")
    assert str(record.losses["loss"]) == str(bad)
    assert "loss=" in str(record)


def test_a_loss_in_a_dict_is_named():
    p, opt = one(1.0)
    opt.step(loss={"ce": torch.tensor([[2.0]]), "aux": torch.tensor(NAN), "n": 3})
    record = opt.records()[0]
    assert record.losses["ce"] == 2.0
    assert record.losses["n"] == 3.0
    assert "aux=nan" in str(record)
    assert "ce=" not in str(record)
    assert p.item() == 0.0


def test_observed_micro_batches_count_together():
    p, opt = one(1.0)
    for value in (1.0, 2.0, 6.0):
        opt.observe(torch.tensor(value))
    opt.step()
    assert opt.records()[0].losses == {"loss": 3.0}
    opt.observe({"loss": 1.0, "aux": 5.0})
    opt.observe({"loss": NAN, "aux": 7.0})
    opt.step(loss=4.0)
    record = opt.records()[0]
    assert (record.action, record.losses["aux"]) == ("skipped", 6.0)
    assert p.item() == -1.0
    opt.step(loss=1.0)  # the bad micro-batch has no further effect
    assert opt.records()[0].losses == {"loss": 1.0}
    assert p.item() == -2.0


def test_a_closure_gives_gradients_and_loss():
    p, opt = one(0.0)

    def closure():
        p.grad = torch.tensor([2.0])
        assert torch.is_grad_enabled()
        return torch.tensor(7.0)

    assert opt.step(closure) == 7.0
    assert opt.records()[0].losses == {"loss": 7.0}
    assert opt.step(closure, loss={"mine": 1.0}) == 7.0
    assert opt.records()[0].losses == {"mine": 1.0}
    assert p.item() == -4.0


def test_a_graph_is_not_kept_alive_by_an_observed_loss():
    p, opt = one(1.0)
    factor = torch.tensor([2.0])
    opt.observe((p * factor).sum())
    saved = weakref.ref(factor)  # referenced by the graph as long as it exists
    del factor
    assert saved() is None
