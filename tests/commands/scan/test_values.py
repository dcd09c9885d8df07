"""NaN and Inf as values are distinguished from words in a sentence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.scan.values import has_nonfinite, nonfinite_values

VALUES = {
    "loss: nan": "loss nan",
    "Loss = NaN": "Loss nan",
    "loss nan": "loss nan",
    "loss\tnan\tlr\t0.1": "loss nan",
    "loss:-inf;": "loss -inf",
    "val_loss: Infinity": "val_loss inf",
    "train/loss=nan val/loss=0.3": "train/loss nan",
    "train_loss=nan.0, aux=-inf.": "train_loss nan, aux -inf",
    "step 100: train loss nan, val loss inf": "train loss nan, val loss inf",
    "{'loss': 'nan', 'grad_norm': inf, 'epoch': 1.17}": "loss nan, grad_norm inf",
    '{"epoch": 3, "loss": NaN, "norm": -Infinity}': "loss nan, norm -inf",
    "[Epoch 3/10] [D loss: nan] [G loss: inf]": "D loss nan, G loss inf",
    "Loss: nan at step 3": "Loss nan",
    "loss is NaN, skipping batch 15": "loss nan",
    "Loss became inf": "Loss inf",
    "loss: -1.#IND ppl 1.#QNAN acc=1.#INF": "loss nan, ppl nan, acc inf",
    "loss 0.5 -> nan": "nan",
    "loss: tensor(nan, device='cuda:0', grad_fn=<MseLossBackward0>)": "loss nan",
    "tensor([nan, 1.0, -inf])": "nan, -inf",
    "Loss: nan (nan)": "Loss nan, nan",
    "loss: nan/nan": "loss nan, nan",
    "| loss | nan |": "loss nan",
    "3,15,nan,0.1": "nan",
    "0.1 nan 0.3": "nan",
    "nan": "nan",
    "[nan, nan]": "nan, nan",
    " lm loss: NAN | grad norm: nan | number of nan iterations: 0 |": "lm loss nan, grad norm nan",
    "INFO epoch 3 loss: nan (nano-banana inference)": "loss nan",
    "best_loss=nan": "best_loss nan",
    "| loss nan | ppl 3.2 | gnorm nan | clip 100 |": "loss nan, gnorm nan",
    "2,nan,": "nan",
    "1,,nan,,": "nan",
}

SENTENCES = {
    "RuntimeError: Function 'MulBackward0' returned nan values in its 0th output.": (
        "MulBackward0 nan"
    ),
    "FloatingPointError: Loss became infinite or NaN at iteration=40!": "Loss non-finite",
    "AssertionError: Rank 3: found NaN in local grad norm in backward pass": "local grad norm nan",
    "ValueError: Loss is nan": "Loss nan",
    "NaN loss at step 40000": "loss nan",
    "Warning: NaN loss detected": "loss nan",
    "Loss NaN/Inf detected (attempt 1/3), recovering from last.pt...": "Loss non-finite",
    "NaN gradients found": "gradients nan",
    "nan detected in loss, stopping": "loss nan",
    "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be": (
        "total norm non-finite"
    ),
    "ValueError: The loss returned in `training_step` is nan or inf.": "loss non-finite",
    "ValueError: The loss returned in `training_step` is nan.": "loss nan",
}

WORDS = [
    "INFO starting inference of nano banana in Nancy's finance department",
    "Infinity War",
    "checking for nan values",
    "no nan found",
    "loss is not nan",
    "if loss is nan: raise",
    "number of nan iterations: 0",
    "Replaced 3 nan by 0",
    "logging_nan_inf_filter=True nan_policy: skip nan-safe --inf nan.py:33",
    "NaN, Inf and overflow checks enabled",
    "NaN or Inf found in input tensor.",
    "Validation loss decreased (inf --> 0.693147).  Saving model ...",
    "Epoch 1: val_loss improved from inf to 0.69314, saving model",
    "best_loss=inf max_norm: inf",
    "best loss: inf",
    "/data/nan/inf.yaml",
    "no NaN loss detected",
    "stop if NaN loss at step 3",
    "checking whether the gradient is NaN",
    "NaN loss detection is on",
    "the gradient is nan-safe, the norm is inf-proof",
    "in case the loss is nan, stop",
    "the loss is finite, the norm is indefinite",
    "eta: nan",
    "time remaining: inf",
    "data_time: nan it/s: inf speed=nan samples/s",
    "loss.nan_to_num() torch.isnan(loss) isinf math.inf",
]


@pytest.mark.parametrize("text", VALUES)
def test_values_are_found_with_their_names(text: str) -> None:
    found, _ = nonfinite_values(text)
    assert ", ".join(f"{name} {value}".strip() for name, value in found) == VALUES[text]


@pytest.mark.parametrize("text", SENTENCES)
def test_messages_that_stop_training_are_findings(text: str) -> None:
    assert has_nonfinite(text)
    found, mentions = nonfinite_values(text)
    assert ", ".join(f"{name} {value}".strip() for name, value in found) == SENTENCES[text]
    assert not mentions


@pytest.mark.parametrize("text", WORDS)
def test_words_are_not_values(text: str) -> None:
    assert nonfinite_values(text)[0] == ()


def test_mentions_are_reported() -> None:
    assert nonfinite_values("no nan found") == ((), True)
    assert nonfinite_values("info nano banana") == ((), False)
    assert nonfinite_values("loss: nan (first nan ever)")[1]


@given(st.floats(), st.sampled_from(["loss={}", "loss: {}", "'loss': {},", "loss {}", "1 {} 2"]))
def test_printed_floats_are_found_only_if_nonfinite(value: float, form: str) -> None:
    found, mentions = nonfinite_values("epoch 1 " + form.format(value))
    assert not mentions
    assert [v.text for v in found] == ([] if math.isfinite(value) else [str(value)])


@given(st.text(max_size=80))
def test_any_text_is_accepted(text: str) -> None:
    nonfinite_values(text)
