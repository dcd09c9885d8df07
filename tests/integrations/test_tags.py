"""The tag of a step names the batches that contributed to the step, even if another optimizer
stepped in between or the gradients of a batch were cleared.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from guardtest import require

BATCHES = 6


def loader():
    return DataLoader(torch.randn(BATCHES, 2, 4), batch_size=None)


def networks():
    return nn.Linear(4, 1), nn.Linear(4, 4)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.01)


def clears_before(i, x, nets, opts, backward):
    """The first optimizer steps on every batch, the second on every second one."""
    (d, g), (opt_d, opt_g) = nets, opts
    opt_d.zero_grad()
    backward(d(g(x).detach()).mean())
    opt_d.step()
    if i % 2:
        opt_g.zero_grad()
        backward(d(g(x)).mean())
        opt_g.step()


def clears_after(i, x, nets, opts, backward):
    (d, g), (opt_d, opt_g) = nets, opts
    backward(d(g(x).detach()).mean())
    opt_d.step()
    opt_d.zero_grad()
    if i % 2:
        backward(d(g(x)).mean())
        opt_g.step()
        opt_g.zero_grad()
        opt_d.zero_grad()


def accumulates(i, x, nets, opts, backward):
    """The second optimizer accumulates two batches."""
    (d, g), (opt_d, opt_g) = nets, opts
    backward(d(g(x).detach()).mean())
    opt_d.step()
    opt_d.zero_grad()
    backward(d(g(x)).mean())
    opt_d.zero_grad()
    if i % 2:
        opt_g.step()
        opt_g.zero_grad()


def with_lightning(batch_of_two):
    lightning = require("lightning")
    from fastguard.integrations.lightning import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList(networks())

        def configure_optimizers(self):
            return [sgd(net) for net in self.nets]

        def training_step(self, x, i):
            batch_of_two(i, x, self.nets, self.optimizers(), self.manual_backward)

    callback = GuardCallback()
    trained(lightning, Module(), callback)
    return callback.optimizers


def trained(lightning, module, callback):
    lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(module, loader())


def with_fabric(batch_of_two):
    fabric_module = require("lightning.fabric")
    from fastguard.integrations.fabric import guard

    fabric = guard(fabric_module.Fabric(accelerator="cpu", devices=1))
    nets, opts = zip(*(fabric.setup(net, sgd(net)) for net in networks()), strict=True)
    for i, x in enumerate(fabric.setup_dataloaders(loader())):
        batch_of_two(i, x, nets, opts, fabric.backward)
    return [opt.optimizer for opt in opts]


def with_accelerate(batch_of_two):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    accelerator = guard(accelerate.Accelerator(cpu=True))
    nets = [accelerator.prepare(net) for net in networks()]
    opts = [accelerator.prepare(sgd(net)) for net in nets]
    for i, x in enumerate(loader()):
        batch_of_two(i, x, nets, opts, accelerator.backward)
    return [opt.optimizer for opt in opts]


def tagged(optimizer):
    return [record.tag["batch"] for record in optimizer.records()]


@pytest.mark.parametrize("train", [with_lightning, with_fabric])
@pytest.mark.parametrize(
    ("batch_of_two", "expected"),
    [
        (clears_before, [1, 3, 5]),
        (clears_after, [1, 3, 5]),
        (accumulates, ["0-1", "2-3", "4-5"]),
    ],
)
def test_an_optimizer_that_steps_on_every_second_batch(train, batch_of_two, expected):
    first, second = train(batch_of_two)
    assert tagged(first) == list(range(BATCHES))
    assert tagged(second) == expected


@pytest.mark.parametrize(
    ("batch_of_two", "expected"),
    [(clears_before, [2, 5, 8]), (clears_after, [2, 5, 8]), (accumulates, ["1-3", "5-7", "9-11"])],
)
def test_accelerate_counts_calls_of_backward(batch_of_two, expected):
    _, second = with_accelerate(batch_of_two)
    assert tagged(second) == expected


def test_a_closure_that_only_accumulates_or_is_cleared_by_the_next_one():
    """Lightning's example of an optimizer that steps on every second batch does so."""
    lightning = require("lightning")
    from fastguard.integrations.lightning import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self, clears):
            super().__init__()
            self.net, self.clears = nn.Linear(4, 1), clears

        def configure_optimizers(self):
            return sgd(self.net)

        def training_step(self, x, i):
            return self.net(x).mean()

        def optimizer_step(self, epoch, i, optimizer, closure):
            optimizer.step(closure=closure) if i % 2 else closure()

        def optimizer_zero_grad(self, epoch, i, optimizer):
            if self.clears or i % 2 == 0:
                optimizer.zero_grad()

    for clears, expected in ((True, [1, 3, 5]), (False, ["0-1", "2-3", "4-5"])):
        callback = GuardCallback()
        trained(lightning, Module(clears), callback)
        assert tagged(callback.optimizers[0]) == expected
