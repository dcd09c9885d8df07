"""The epoch, batch and step of a line are found, and other numbers are ignored."""

from __future__ import annotations

import io

import pytest

from fastguard.commands.scan.found import LogScan
from fastguard.commands.scan.places import where_in
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import scan_log


def scan(text: str) -> LogScan:
    return scan_log(io.BytesIO(text.encode()))


LAUNCHERS = [
    "[1,0]<stdout>:",
    "[1,12]<stderr>: ",
    "Thu Apr  5 13:43:17 2018[1,2]<stdout>:",
    "[1,mpirank:0,algo-1]<stdout>:",
    "[0]<stdout>:",
    "[rank0]:",
    "[rank13]: ",
    "[default0]:",
    "[rank: 3] ",
    "0: ",
    "12: ",
    "worker-3: ",
    "(RayTrainWorker pid=4711, ip=10.0.0.1) ",
    "(pid=1234) ",
    "2024-05-01T10:11:12.123456789Z ",
    "2024-05-01T10:11:12.123456789Z stdout F ",
    "2024-05-01 10:11:12,123 ",
    "trainer-1  | ",
    "[pod/trainer-0/pytorch] ",
    "Jan 01 10:11:12 node-3 python[4711]: ",
]


def test_epoch_that_a_run_was_resumed_from_is_not_a_place() -> None:
    found = scan("resumed from epoch 3, now epoch 7 loss nan")
    assert found.stretches[0].first == Place(epoch=7)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_prefixes_are_not_places(launcher: str) -> None:
    (stretch,) = scan(f"{launcher}loss is nan\n").stretches
    assert stretch.first == Place()
    (stretch,) = scan(f"{launcher}Epoch 3/10, Batch 15/41\n{launcher}loss nan\n").stretches
    assert stretch.first == Place(3, 10, 15, 41)
    assert [name for name, _ in stretch.values] == ["loss"]


SETTINGS = [
    "Namespace(batch_size=64, epoch=200, lr=0.1)",
    "args: Namespace(epoch=200, data='x', opt=SGD(lr=0.1), step=7)",
    "TrainConfig(step=5000, lr=0.1)",
    "{'epoch': 200, 'batch_size': 64, 'lr': 0.1}",
    '{"epoch": 200, "batch_size": 64, "lr": 0.1}',
    "engine/trainer: task=detect, mode=train, model=yolo11n.pt, epochs=100, batch=16, imgsz=640",
    "+ python train.py --epoch 200 --batch 64 --step 7",
    "config: epoch=200 batch_size=64 seed=1",
    "batch_size: 64\nepoch: 200\nlr: 0.1",
    "loading checkpoints/epoch=200-step=7.ckpt",
    "best epoch 200 so far",
    "total step: 5000, warmup step: 500",
    "epochs: 200",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_not_places(setting: str) -> None:
    (stretch,) = scan(f"{setting}\niter 20 loss nan\n").stretches
    assert stretch.first == Place(step=20)


@pytest.mark.parametrize(
    "text, place",
    [
        ("train: step 12, lr=0.1, momentum=0.9, loss=0.5", Place(step=12)),
        ("TrainOutput(global_step=12, training_loss=0.5)", Place(step=12)),
        ("[rank0]:epoch 3 iteration 12", Place(3, step=12)),
        ("训练 epoch：3, step：12", Place(3, step=12)),
        ("Saved epoch 3 to model.pt", Place(3)),
    ],
)
def test_place_is_found_beside_settings(text: str, place: Place) -> None:
    assert where_in(text).place(text) == place
    assert where_in(text).in_bytes(text, text.encode()).place(text.encode()) == place


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("[3/25][120/1583]\tLoss_D: nan", Place(3, 25, 120, 1583)),
        ("12:30:15 | INFO | [3/100] [12/200] loss: nan", Place(3, 100, 12, 200)),
        ("(trainer:709) INFO: 12epoch:train:101-200batch: loss=nan", Place(12, None, 101)),
    ],
)
def test_epoch_and_batch_in_brackets_or_before_their_names(line: str, place: Place) -> None:
    assert scan(line).stretches[0].first == place
