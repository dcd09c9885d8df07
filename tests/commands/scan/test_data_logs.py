"""Structured logs: values are read with their steps, and each series is judged.

Two other tools, losslint 0.4 and trainspotter 0.2, were run on eight such files. `scan` must report
the findings of both tools, at the same steps.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastguard.commands.cli import main
from fastguard.commands.scan.scanner import scan_log

SPIKE = "SpikeRule(sigma=6) would have skipped "


def losses(n: int, seed: int = 0) -> list[float]:
    r = random.Random(seed)
    return [2.0 * math.exp(-i / 20) + 0.3 + r.gauss(0, 0.02) for i in range(1, n + 1)]


def table(path: Path, head: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def trainer_state(path: Path, **series: list[float]) -> None:
    """The file that the Trainer of Transformers writes."""
    n = len(next(iter(series.values())))
    history = [
        {"epoch": i / 10, **{name: values[i] for name, values in series.items()}, "step": i + 1}
        for i in range(n)
    ]
    state = {"best_metric": None, "epoch": n / 10, "global_step": n, "log_history": history}
    path.write_text(json.dumps(state, indent=2) + "\n")


def nan_in_trainer_state(path: Path) -> None:
    values = losses(20)
    values[5:8] = [math.nan] * 3
    trainer_state(path, loss=values, grad_norm=[1.0 + 0.01 * (i % 7) for i in range(20)])


def spike_in_csv(path: Path) -> None:
    values = losses(40)
    values[14] = 48.2
    table(path, ["step", "loss", "lr"], [[i, v, 1e-4] for i, v in enumerate(values, 1)])


def divergence_in_json_lines(path: Path) -> None:
    values = [*losses(30), *(0.75 * 1.06**i for i in range(30))]
    lines = [json.dumps({"_step": i, "train/loss": v}) for i, v in enumerate(values, 1)]
    path.write_text("\n".join(lines) + "\n")


def nan_in_lightning(path: Path) -> None:
    rows: list[list[object]] = []
    for i, value in enumerate(losses(30)):
        rows.append([i // 10, 10 * i + 9, "nan" if i >= 23 else value, ""])
        if i % 10 == 9:
            rows.append([i // 10, 10 * i + 9, "", value])
    table(path, ["epoch", "step", "train_loss_step", "val_loss"], rows)


def explosion_of_a_norm(path: Path) -> None:
    r = random.Random(0)
    norms = [1 + 0.1 * r.random() for _ in range(40)]
    norms[29] = 55.0
    trainer_state(path, loss=losses(40), grad_norm=norms)


def divergence_in_wandb(path: Path) -> None:
    values = [*losses(35), *(0.6 * 1.08**i for i in range(25))]
    head = ["Step", "run-1 - train/loss", "run-1 - train/loss__MIN", "run-1 - train/loss__MAX"]
    table(path, head, [[i, v, v, v] for i, v in enumerate(values)])


def nan_and_spike_in_events(path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    folder = path.with_suffix(".runs")
    values = losses(40)
    with SummaryWriter(str(folder)) as writer:
        for i, value in enumerate(values):
            writer.add_scalar("train/loss", math.nan if i == 33 else value, i)
            writer.add_scalar("train/grad_norm", 90.0 if i == 25 else 1 + value / 100, i)
            writer.add_text("note", "nan", i)
            writer.add_histogram("weights", np.array([float(i), 1.0]), i)
    (written,) = folder.iterdir()
    written.rename(path)


def healthy(path: Path) -> None:
    r = random.Random(1)
    rows: list[list[object]] = [
        [i, v, v + 0.1 if i % 10 == 0 else "", 1 + 0.2 * abs(r.gauss(0, 1))]
        for i, v in enumerate(losses(300))
    ]
    table(path, ["step", "loss", "eval_loss", "grad_norm"], rows)


KINDS = {"nan": ": NaN or Inf in", "spike": SPIKE, "growth": "climbing since"}
FILES: dict[str, tuple[Callable[[Path], None], set[str], list[str]]] = {
    # losslint: "first steps: 6, 7, 8"; trainspotter: "steps 6-8, train/loss became NaN at step 6"
    "trainer_state.json": (nan_in_trainer_state, {"nan"}, ["step 6)", "steps 6, 7, 8", "loss nan"]),
    # losslint: "spiked 1 time(s) ... step 15 (loss 48.2)"; trainspotter: "steps 15 Loss spike"
    "spike.csv": (spike_in_csv, {"spike"}, [f"loss: {SPIKE}step 15: 48.2, "]),
    # losslint: "train loss diverged"; trainspotter: "climbing for the last 15 logged points"
    "diverged.jsonl": (
        divergence_in_json_lines,
        {"growth"},
        [r"train/loss: climbing since step (29|3\d), "],
    ),
    # losslint: "first steps: 239, 249, ..."; trainspotter: "steps 239-299"
    "metrics.csv": (nan_in_lightning, {"nan"}, ["epoch 2, step 239)", "239, 249, 259", "299"]),
    # trainspotter: "Gradient-norm explosion, grad_norm hit 55 at step 30"; losslint: clean
    "norms.json": (explosion_of_a_norm, {"spike"}, [f"grad_norm: {SPIKE}step 30: 55, "]),
    # losslint: "train loss diverged"; trainspotter: "steps 45-59, 6.34x its running minimum"
    "wandb.csv": (
        divergence_in_wandb,
        {"growth"},
        [r"run-1 - train/loss: climbing since step 3\d, "],
    ),
    # losslint: "train/loss has 1 NaN/Inf value(s) (first steps: 33)"; it does not judge the norm
    "events.out.tfevents.1": (
        nan_and_spike_in_events,
        {"nan", "spike"},
        ["step 33)", "train/loss nan", f"train/grad_norm: {SPIKE}step 25: 90, "],
    ),
    # both tools: clean
    "healthy.csv": (healthy, set(), ["no NaN or Inf in 301 lines"]),
}


@pytest.mark.parametrize("name", FILES)
def test_findings_match_those_of_other_tools(name: str, tmp_path: Path, capsys) -> None:
    write, kinds, facts = FILES[name]
    path = tmp_path / name
    write(path)
    assert main(["scan", str(path)]) == bool(kinds)
    out = capsys.readouterr().out
    for fact in facts:
        assert re.search(fact if "\\d" in fact else re.escape(fact), out), out
    assert {kind for kind, words in KINDS.items() if words in out} == kinds  # and nothing else
    assert main(["scan", "--json", str(path)]) == bool(kinds)
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["bad_lines"] > 0) == ("nan" in kinds)
    assert any(series["n_spikes"] for series in told["series"]) == ("spike" in kinds)
    assert any(series["climbing_since"] for series in told["series"]) == ("growth" in kinds)


def said(tmp_path: Path, capsys, name: str, text: str | bytes) -> tuple[int, str]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = main(["scan", str(path)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize(
    "text, facts",
    [
        ('{"step": 6, "train": {"loss": NaN, "lr": 0.1}}\n', ["step 6)", "train/loss nan"]),
        ('{"_step": 6, "loss": "NaN", "_runtime": 3.5}\n', ["step 6)", "loss nan"]),
        ('{"iteration": 6, "total_loss": Infinity}\n', ["step 6)", "total_loss inf"]),
        ('{"key": "loss", "value": "-Infinity", "step": 6}\n', ["step 6)", "loss -inf"]),
        ('{"step": 6, "norms": [1.0, [NaN]]}\n', ["step 6)", "norms nan"]),
        ('{"log": "epoch 3 batch 15: loss nan\\n", "stream": "stdout"}\n', ["epoch 3, batch 15)"]),
        ('{"message": "Loss is nan", "epoch": 3}\n', ["epoch 3)", "Loss nan"]),
        ('[{"step": 5, "loss": 1.0}, {"step": 6, "loss": NaN}]', ["step 6)", "loss nan"]),
        ('{"loss": [2.3, NaN, NaN], "acc": [0.1, 0.1, 0.1]}', ["epoch 2)", "loss nan"]),
        ('{\n "step": 6,\n "loss": NaN\n}\n', ["step 6)", "loss nan"]),
        (
            '{\n "lr": 0.1,\n "epoch": 200,\n "seed": 1\n}\nepoch 3 loss nan\n',
            ["epoch 3)", "line 6"],
        ),
        ("key,value,step\nloss,0.5,5\nloss,nan,6\n", ["step 6)", "loss nan"]),
        (
            "Wall time,Step,Value\n1700000000.0,5,0.5\n1700000001.0,6,NaN\n",
            ["step 6)", "Value nan"],
        ),
        ('"step";"loss"\n5;0.5\n6;inf\n', ["step 6)", "loss inf"]),
        ("epoch|step|loss\n0|5|0.5\n0|6|inf\n", ["epoch 0, step 6)", "loss inf"]),
        ("# run 3\n# lr=0.1\nstep,loss\n5,0.5\n6,nan\n", ["step 6)", "loss nan"]),
        ("- step: 6\n  loss: .nan\n  floor: -.inf\n", ["step 6)", "loss nan", "floor -inf"]),
        ('{"step": 6, "m": [{"name": "loss", "value": NaN}]}\n' * 6, ["step 6)", "m/loss nan"]),
        ('{"step": 6, "m": [{"loss": 1, "b": [NaN]}]}\n' * 2, ["step 6)", "m/b nan"]),
        ('{"step": 6, "m": [[{"loss": -Infinity}]]}\n' * 6, ["step 6)", "m -inf"]),
    ],
)
def test_structured_formats(text: str, facts: list[str], tmp_path: Path, capsys) -> None:
    status, out = said(tmp_path, capsys, "log", text)
    assert status == 1 and all(fact in out for fact in facts), out


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 6, "loss": 0.5, "best_loss": Infinity, "samples_per_second": "inf"}\n',
        '{"lang": "nan", "loss": 0.5}\n',
        '{"msg": "no nan found", "loss": 0.5}\n',
        '{"level": "INF", "msg": "epoch 3", "loss": 0.3}\n',
        '{"missing": NaN, "max_depth": 6}\n',
        "step,loss,best_acc,it/s\n1,0.5,-inf,inf\n",
    ],
)
def test_bounds_rates_and_settings_in_data_are_ignored(text: str, tmp_path: Path, capsys) -> None:
    assert said(tmp_path, capsys, "log", text)[0] == 0


def test_truncated_document_is_read_as_text(tmp_path: Path, capsys) -> None:
    path = tmp_path / "trainer_state.json"
    nan_in_trainer_state(path)
    whole = path.read_text()
    status, out = said(tmp_path, capsys, "cut.json", whole[: len(whole) * 3 // 4])
    assert status == 1 and "NaN or Inf in 3 of" in out


RECORD = (
    '{"step": 3, "total_norm": "NaN", "clip_coef": 1.0, "action": "skipped", '
    '"reason": "nonfinite_loss", "losses": {"loss": "NaN"}}\n'
)


def test_fastguard_records_are_left_to_report(tmp_path: Path, capsys) -> None:
    status, out = said(tmp_path, capsys, "records.jsonl", RECORD * 3)
    assert status == 2 and "the log contains fastguard records; use: fastguard report" in out
    assert "no NaN" not in out
    status, out = said(tmp_path, capsys, "both.jsonl", RECORD + '{"step": 4, "loss": NaN}\n')
    assert status == 1 and "NaN or Inf in 1 of 2 lines" in out and "fastguard report" in out
    assert "1 line is a fastguard record" in out


def test_damaged_or_truncated_event_files_are_reported(tmp_path: Path, capsys) -> None:
    path = tmp_path / "events.out.tfevents.1"
    nan_and_spike_in_events(path)
    whole = path.read_bytes()
    status, out = said(tmp_path, capsys, "cut", whole[:-7])
    assert status == 1 and "a truncated or damaged event file" in out
    huge = whole[:100] + (1 << 60).to_bytes(8, "little") + whole[108:]
    assert said(tmp_path, capsys, "huge", huge)[0] == 2
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    status, out = said(tmp_path, capsys, "flipped", bytes(flipped))
    assert status in (1, 2) and "Traceback" not in out and "event" in out


def test_missing_tensorboard_names_the_extra(tmp_path: Path, capsys, monkeypatch) -> None:
    path = tmp_path / "events.out.tfevents.1"
    nan_and_spike_in_events(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["scan", str(path)]) == 2
    assert "pip install 'torch-fastguard[tensorboard]'" in capsys.readouterr().err


def test_time_for_a_document_is_linear_in_its_size() -> None:
    def seconds(n: int) -> float:
        text = "{" + ",".join(f'"a{i}":[{{"loss":1}}]' for i in range(n)) + "}"
        times = []
        for _ in range(3):  # uses the shortest time, because a garbage collection may disturb a run
            begun = time.process_time()
            assert scan_log(io.BytesIO(text.encode())).n_lines == n
            times.append(time.process_time() - begun)
        return min(times)

    # If each list were searched for from the start, the factor would be 64.
    assert seconds(16_000) < 24 * seconds(2_000)
