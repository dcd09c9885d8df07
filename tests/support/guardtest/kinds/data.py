"""Inputs, targets, and the contents of further batches."""

from __future__ import annotations

import math

import torch
from torch import nn

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import classification, regression


@case("nonfinite-data", "error", "data", where="inputs", says="1 NaN")
def nonfinite_data(faulty: bool) -> Setup:
    setup = regression()
    if faulty:
        setup["batch"][0][3, 1] = math.nan
    return setup


@case("range", "warning", "data", where="inputs", says="from 0 to 255")
def data_range(faulty: bool) -> Setup:
    setup = regression()
    inputs = torch.randint(1, 255, (8, 4)).float()
    inputs[0, 0], inputs[1, 1] = 0, 255
    return setup | {"batch": (inputs if faulty else inputs / 255, setup["batch"][1])}


@case("constant-data", "warning", "data", where="data[1].inputs", says="all 32 elements are 0.5")
def constant_data(faulty: bool) -> Setup:
    setup = regression()
    batches = [setup["batch"], (torch.full((8, 4), 0.5), torch.randn(8, 1))]
    return setup | {"data": batches if faulty else batches[:1]}


@case("one-label", "warning", "data", where="targets", says="all 16 labels are 2")
def one_label(faulty: bool) -> Setup:
    labels = torch.full((16,), 2)
    labels[0] = 2 if faulty else 0
    return classification() | {"batch": (torch.randn(16, 4), labels)}


@case("index-out-of-range", "error", "data", where="targets", says="0 to 3; expected 0 to 2")
def index_out_of_range(faulty: bool) -> Setup:
    labels = torch.tensor([0, 1, 2, 3 if faulty else 0, -100, 1, 2, 0])
    return classification(labels)


@case("target-out-of-range", "error", "data", where="targets", says="from 0 to 255")
def target_out_of_range(faulty: bool) -> Setup:
    mask = torch.tensor([[0.0], [1.0]] * 4) * (255 if faulty else 1)
    inputs = torch.randn(8, 4)
    return regression() | {"batch": (inputs, mask), "loss_fn": nn.BCEWithLogitsLoss()}


@case("duplicates", "warning", "data", where="batch", says="2 of 8")
def duplicates(faulty: bool) -> Setup:
    setup = classification()
    inputs, labels = setup["batch"]
    if faulty:
        inputs[5:7], labels[5:7] = inputs[1], labels[1]
        return setup
    return setup | {"data": [setup["batch"]]}  # a batch is not a duplicate of itself


@case("contradicting-labels", "warning", "data", where="data", says="1 of 16 samples")
def contradicting_labels(faulty: bool) -> Setup:
    batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]
    batches[1][0][0] = batches[0][0][0]
    batches[1][1][0] = 1 if faulty else 0
    return classification(data=batches)
