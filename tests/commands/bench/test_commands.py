"""The benchmark commands and scripts run on cases of a few kilobytes."""

import functools
import subprocess
import sys

import pytest
import torch

from fastguard.commands.bench import run_case
from fastguard.commands.bench.contenders import CONTENDERS
from fastguard.commands.bench.machine import Evictor
from fastguard.commands.bench.results import find, load
from fastguard.commands.cli import main
from guardtest import require
from guardtest.bench import CPU, LIMIT, ROOT, a_case

PAIR = ("torch foreach", "fastguard")


@pytest.fixture
def tiny(monkeypatch):
    """Two small cases, with fixed bandwidths and the minimum number of rounds."""
    monkeypatch.setattr("fastguard.commands.bench.session.ceilings", lambda device: LIMIT)
    return [a_case(contenders=PAIR), a_case(contenders=PAIR, situation="clipping")]


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("nonsense", "is not a device; use cpu, cuda or cuda:1"),
        ("meta", "is not supported; use cpu or cuda"),
        ("cuda:99", r"CUDA devices here; use --device cpu"),
    ],
)
def test_a_missing_device_is_a_usage_error(device, says, capsys):
    require("rich")
    assert main(["bench", "--device", device]) == 2
    printed = capsys.readouterr().err
    assert says in printed and device in printed and "Traceback" not in printed


def test_fastguard_bench_measures_prints_and_writes(tiny, tmp_path, monkeypatch, capsys):
    require("rich")
    monkeypatch.setattr("fastguard.commands.bench.command.selection", lambda device: tiny)
    monkeypatch.setattr("fastguard.commands.bench.command.SECONDS", 0.0)
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").iterdir()
    result = load(path)
    assert result["command"] == "fastguard bench --device cpu"
    for case in tiny:
        assert find(result, case.id, "fastguard")["ratio"]["p50"] > 0
    printed = capsys.readouterr().out
    assert "tiny" in printed and path.name in printed.replace("\n", "")


def test_a_cold_case_evicts_the_caches_before_every_call(monkeypatch):
    emptied = []
    plain = Evictor.__call__
    monkeypatch.setattr(Evictor, "__call__", lambda self: (emptied.append(1), plain(self)))
    monkeypatch.setattr("fastguard.commands.bench.machine.cache_bytes", lambda device: 0)
    rows, _ = run_case(a_case(contenders=PAIR, cold=True), CPU, LIMIT, seconds=0.0)
    assert [row.cold for row in rows] == [True, True]
    assert len(emptied) >= sum(row.rounds for row in rows)


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if "compiled" in name])
def test_compiled_contenders_compute_the_norm(contender, monkeypatch):
    """The compiled contenders use a backend that needs no C++ compiler."""
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("torch.compile", compiled)
    contenders = ("torch foreach", contender)
    rows, left_out = run_case(a_case(contenders=contenders), CPU, LIMIT, seconds=0.0)
    assert [row.contender for row in rows] == list(contenders) and not left_out
    assert all(row.norm_error is not None and row.norm_error < 1e-6 for row in rows)


# The benchmarks of the source tree.


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "whole"])
def test_make_bench_measures_prints_writes_and_draws(
    tiny, quick, benchmarks, tmp_path, monkeypatch, capsys
):
    require("rich")
    require("matplotlib")
    command, memory = benchmarks("__main__"), benchmarks("memory")
    for name in ("SECONDS", "POINT_SECONDS", "CPU_SECONDS"):
        monkeypatch.setattr(command, name, 0.0)
    for name in ("selection", "cases", "growth_cases"):
        monkeypatch.setattr(command, name, lambda device: tiny)
    tiny_memory = [a_case(contenders=memory.FIELD)]
    monkeypatch.setattr(command, "memory_cases", lambda: tiny_memory)
    monkeypatch.setattr(command, "accuracy_cases", lambda: tiny[:1])
    options = ["--quick"] if quick else []
    monkeypatch.setattr("sys.argv", ["benchmarks", *options, "--out", str(tmp_path)])
    assert command.main() == 0
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-quick") is quick
    result = load(path)
    assert find(result, tiny[0].id, "fastguard")
    assert bool(result["memory"]) is bool(result["accuracy"]) is not quick
    assert list(tmp_path.glob("*.svg"))
    assert "tiny" in capsys.readouterr().out


def test_make_bench_refuses_a_missing_device(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--device", "cuda:99"])
    assert benchmarks("__main__").main() == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.fixture
def gpu(benchmarks, monkeypatch):
    """`benchmarks/gpu.py` with two small cases: functions and whole steps."""
    script = benchmarks("gpu")
    function = a_case(contenders=(*script.CLIP, script.READ_PASS))
    step = a_case(contenders=script.STEP, baseline=script.USUAL_STEP, optimizer=("AdamW", "fused"))
    monkeypatch.setattr(script, "ceilings", lambda device: LIMIT)
    monkeypatch.setattr(script, "cases", lambda: [function, step])
    return script


@pytest.mark.parametrize("seconds", ["60", "-1"], ids=["", "out of time"])
def test_the_gpu_script_runs_on_a_cpu(seconds, gpu, tmp_path, monkeypatch, capsys):
    require("rich")
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--quick", "--seconds", seconds, "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu", *options])
    assert gpu.main() == 0
    result = load(out)
    assert result["failures"] == {}
    measured = [row["contender"] for row in result["rows"]]
    wanted = [name for case in gpu.cases() for name in case.contenders]
    assert measured == (wanted if seconds == "60" else [])
    assert len(result["left_out"]) == (0 if seconds == "60" else len(wanted))
    assert "Ceilings" in capsys.readouterr().out


def test_the_gpu_script_names_failed_cases_and_exits_with_1(gpu, tmp_path, monkeypatch):
    require("rich")

    def broken(case, *args, **options):
        raise RuntimeError(f"broken: {case.name}")

    monkeypatch.setattr(gpu, "run_case", broken)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--quick", "--out", str(out)])
    assert gpu.main() == 1
    assert set(load(out)["failures"].values()) == {"RuntimeError: broken: tiny / 256"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_script_without_a_gpu_explains_what_to_do(gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 2
    printed = capsys.readouterr().err
    assert "--device cpu" in printed and "--quick" in printed


def test_the_suite_is_collected_by_pytest():
    require("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastguard flat trusted]" in done.stdout
