"""Each dialect reads real output of its framework and similar output of other programs.

The logs are real output of Ultralytics 8.4, Lightning 2.6 (progress bars of tqdm, and of rich as
recorded by a terminal) and transformers 5.23. The losses of these runs were made NaN at a known
batch.
"""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path

import pytest

from fastguard import StepRecord
from fastguard.commands.scan.plain import Plain
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import LogScan, scan_log

LOGS = Path(__file__).parent / "logs"


def scan(text: str) -> LogScan:
    return scan_log(io.BytesIO(text.encode()))


def scan_file(name: str) -> LogScan:
    with (LOGS / name).open("rb") as file:
        return scan_log(file)


def values(found: LogScan, i: int = 0) -> set[str]:
    return {f"{name} {text}" for name, text in found.stretches[i].values}


def test_ultralytics() -> None:
    found = scan_file("ultralytics.log")  # NaN from the sixth of eight batches of epoch 2
    (stretch,) = found.stretches
    assert stretch.dialect == "ultralytics" and stretch.first_line == 6
    assert stretch.first == Place(epoch=2, epochs=2, batch=5, batches=8)
    assert stretch.last == Place(epoch=2, epochs=2, batch=8, batches=8)
    assert values(found) == {"box_loss nan", "cls_loss nan", "dfl_loss nan"}


def test_lightning_drawn_by_tqdm() -> None:
    found = scan_file("lightning-tqdm.log")  # aux -inf at batch index 4; loss NaN from epoch 1
    assert {stretch.dialect for stretch in found.stretches} == {"lightning"}
    first, second, third = found.stretches
    assert first.first == Place(epoch=0, batch=5, batches=6)
    assert values(found, 0) == {"aux -inf"}
    assert second.first == Place(epoch=1, batch=4, batches=6)
    assert second.last == Place(epoch=1, batch=6, batches=6)  # although the bar is drawn again at 0
    assert values(found, 1) == {"train_loss nan", "aux -inf", "val_loss nan"}
    assert third.first.epoch == 2


def test_lightning_drawn_by_rich() -> None:
    found = scan_file("lightning-rich.log")
    first, second = found.stretches
    assert first.first == Place(epoch=1, epochs=2, batch=6, batches=6)
    assert values(found, 0) == {"train_loss nan"}
    assert second.last.epoch == 2 and values(found, 1) == {"train_loss nan", "val_loss nan"}


def test_hugging_face() -> None:
    found = scan_file("huggingface.log")  # 12 steps in 2 epochs, NaN from the seventh
    first, second = found.stretches
    assert first.dialect == "huggingface"
    assert (first.first.epoch, first.first.step) == (1.167, 7)
    assert (first.last.epoch, first.last.step, first.n_lines) == (1.833, 11, 5)
    assert values(found) == {"loss nan", "grad_norm nan"}
    assert (second.first.epoch, second.last.step) == (2, 12)
    assert values(found, 1) == {"loss nan", "grad_norm nan", "train_loss nan"}


def test_hugging_face_before_version_5() -> None:
    found = scan("{'loss': nan, 'grad_norm': nan, 'learning_rate': 5e-05, 'epoch': 0.01}\n")
    assert found.stretches[0].first == Place(epoch=0.01)
    assert values(found) == {"loss nan", "grad_norm nan"}


ULTRALYTICS_TQDM = """
      Epoch    GPU_mem   box_loss   cls_loss   dfl_loss  Instances       Size
      3/100      2.1G        nan      2.346     0.9877         34        640: 37%|██| 15/41163 [0
                 Class     Images  Instances      Box(P          R      mAP50  mAP50-95): 100%
                   all        128        929      0.642      0.537      0.605      0.446
"""


def test_ultralytics_with_a_tqdm_bar() -> None:
    found = scan(ULTRALYTICS_TQDM)
    assert found.n_bad == 1 and values(found) == {"box_loss nan"}
    assert found.stretches[0].first == Place(3, 100, 15, 41163)


@pytest.mark.parametrize(
    "text, place",
    [
        ("epoch 3, batch 15: loss nan", Place(3, None, 15)),
        ("Epoch 3/10 Batch 15/41 Loss: nan", Place(3, 10, 15, 41)),
        ("[Epoch 3/10] [Batch 15/41] [D loss: nan]", Place(3, 10, 15, 41)),
        ("Epoch: [3][15/41]  Time 0.1 (0.2)  Loss nan (nan)", Place(3, None, 15, 41)),
        ("[3,  2000] loss: nan", Place(3, None, 2000)),
        ("epoch=3 step=1500 loss=nan", Place(3, step=1500)),
        ("iter 100: loss nan, time 123.21ms", Place(step=100)),
        ("Epoch 3/10\n15/41 ━━━━━ 0s 2ms/step - loss: nan", Place(3, 10, 15, 41)),
        ("Epoch 3/10\n15/41 [====>....] - ETA: 0s - loss: nan", Place(3, 10, 15, 41)),
        ("| epoch 003:     15 / 41 loss=nan, ppl=inf", Place(3, None, 15, 41)),
        ("--- epoch 3 ---\nloss nan", Place(3)),
        ("Epoch 3: 37%|███▋ | 15/41 [00:01<00:02, 12.3it/s, loss=nan]", Place(3, None, 15, 41)),
        ("37%|███▋      | 15/41 [00:01<00:02, 12.3it/s, loss=nan]", Place(None, None, 15, 41)),
        ('{"epoch": 3, "step": 15, "loss": NaN}', Place(3, step=15)),
        (" iteration      100/ 1000 | lm loss: NAN |", Place(step=100)),
        ("epoch 2 batch 40 loss 0.5\nepoch 3\nloss nan", Place(3)),
        ("batch size: 16, epochs=100, 3 steps/s, loss nan", Place()),
        ("[11/21 03:00:10 d2.utils.events]: iter: 39  total_loss: nan", Place(step=39)),
        ("11/21 03:00:10 - mmengine - INFO - [15/41] loss: nan", Place(None, None, 15, 41)),
        ("[2026/11/21 03:00:10] [15/41] loss: nan", Place(None, None, 15, 41)),
        ("[21/11/2026] loss: nan", Place()),
        ("[11/41 00:12<00:30, 2.3it/s] loss: nan", Place(None, None, 11, 41)),
        ("[11/12 01:00:12 < 00:30:10] loss: nan", Place(None, None, 11, 12)),
        ("Epoch 11/12 03:00:10 loss: nan", Place(11, 12)),
        ("11/21 03:00:10 - Epoch(train)  [3][ 100/1000]  loss: nan", Place(3, None, 100, 1000)),
        ("11/21 03:00:10 - Iter(train) [  100/1000]  loss: nan", Place(None, None, 100, 1000, 100)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plain_prints(text: str, place: Place) -> None:
    found = scan(text)
    assert found.n_bad == 1
    assert found.stretches[0].first == place


def test_dates_are_not_batches() -> None:
    line = "[11/{} 03:00:10 d2.utils.events]: iter: {}  total_loss: nan\n"
    (stretch,) = scan(line.format(21, 39) + line.format(22, 59)).stretches
    assert (stretch.first, stretch.last) == (Place(step=39), Place(step=59))


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "loss",
        "loss nan ",
        "nan ",
        "nan,",
        "[1/2",
        "epoch ",
        "[",
        "(",
        " ",
        "1",
        "1/2 ",
        "11/21 ",
        "= ",
        "|",
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "start", ["", "epoch ", "Epoch 1", "  1/2 0G ", "37%|", "{'epoch': ", "loss=", "step "]
)
def test_time_per_line_is_bounded(start: str, piece: str) -> None:
    line = start + piece * (20_000 // len(piece)) + " nan"
    begun = time.process_time()
    scan(line)
    assert time.process_time() - begun < 1.0  # a pattern that backtracks takes 3 s to hours


def test_search_for_a_loss_scale_is_not_a_finding() -> None:
    record = StepRecord(7, 0.0, 1.0, "skipped", "loss_scale", posinf=3, culprits=(("w", 0, 3, 0),))
    reading = Plain().read(f"03:16:02 INFO fastguard: {record}")
    assert reading is not None
    assert (reading.bad, reading.measured, reading.place.step) == ((), False, 7)
    incident = Plain().read(f"WARNING {dataclasses.replace(record, reason='nonfinite_grad')}")
    assert incident is not None and incident.bad
