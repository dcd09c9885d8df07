"""The benchmark runner, on gradients of a few kilobytes. Nothing here asserts on time."""

import copy
import importlib
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastguard.bench import Case, Row, Workload, run_case
from fastguard.bench.clock import Clock, Sample
from fastguard.bench.contenders import CONTENDERS, NotHere
from fastguard.bench.machine import Ceilings, ceilings, describe_machine, slug_of
from fastguard.bench.results import check, find, load, save
from fastguard.bench.runner import (
    FEWEST_ROUNDS,
    Spread,
    interleave,
    prepare,
    relative_error,
    summarise,
)
from fastguard.bench.selection import gpt2_shapes, selection
from fastguard.bench.session import measure_cases
from fastguard.bench.steps import STEPS
from fastguard.bench.targets import NOT_MEASURED, judge
from guardtest import require

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LIMIT = Ceilings(read_gb_s=10.0, update_gb_s=20.0, copy_gb_s=20.0)
SHAPES = [(40, 7), (7,), (3, 5, 2), (300,)]
EAGER = tuple(name for name in CONTENDERS if "compiled" not in name and "measure" not in name)
ON_CPU = tuple(name for name in EAGER if name not in ("apex", "TransformerEngine"))


@pytest.fixture(scope="module")
def benchmarks():
    """The package of the source tree, which is not installed."""
    place = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def a_case(**changes) -> Case:
    return replace(Case("tiny", SHAPES, EAGER), **changes)


def a_result(**changes):
    cases = [
        a_case(),
        a_case(situation="clipping"),
        *(
            a_case(name=f"{n} x 9", series="tensors", shapes=((9,),) * n, contenders=ON_CPU)
            for n in (1, 2, 3)
        ),
        Case(
            "tiny", SHAPES, tuple(STEPS), "clip + isfinite(norm) + step",
            optimizer=("AdamW", "fused"),
        ),
    ]  # fmt: skip
    result = measure_cases(cases, CPU, command="python -m benchmarks", seconds=0.0)
    return result | changes


@pytest.fixture(scope="module")
def result(benchmarks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastguard.bench.session.ceilings", lambda device: LIMIT)
        found = a_result()
    found["fits"] = benchmarks("growth").fits(found)
    memory = benchmarks("memory")
    found["memory"] = [
        row
        for mb in (1, 2)
        for row in memory.measure_memory(Case(f"{mb} MB", [(mb * 2**17,)] * 2, memory.FIELD), CPU)
    ]
    return found


# The peers do the same work.


@pytest.mark.parametrize("situation", ["nothing to clip", "clipping"])
@pytest.mark.parametrize("contender", ON_CPU)
def test_every_contender_gives_the_gradients_and_the_norm_of_torch(contender, situation):
    work = Workload(a_case(situation=situation), CPU)
    expected = [g.clone() for g in work.grads]
    coef = min(1.0, work.max_norm / (work.true_norm + 1e-6))
    prepared = CONTENDERS[contender](work)
    norm = prepared.call()
    assert relative_error(norm, work.true_norm) < 1e-6
    for p, before in zip(prepared.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, before * coef, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("contender", ["torch foreach", "fastguard", "fastguard flat"])
def test_zero_mode_and_its_peer_clean_the_same_element(contender):
    work = Workload(a_case(situation="one NaN, zeroed"), CPU)
    dirty = sum(int(g.isnan().sum()) for g in work.grads)
    prepared = CONTENDERS[contender](work)
    norm = prepared.call()
    assert dirty == 1
    assert relative_error(norm, work.true_norm) < 1e-6
    assert all(p.grad.isfinite().all() for p in prepared.parameters)


@pytest.mark.parametrize("optimizer", [("AdamW", "fused"), ("SGD", "foreach")])
@pytest.mark.parametrize("situation", ["nothing to clip", "clipping", "one NaN, skipped"])
def test_every_step_leaves_finite_weights_and_can_be_repeated(optimizer, situation):
    case = a_case(
        contenders=tuple(STEPS), baseline="bare step", optimizer=optimizer, situation=situation
    )
    with torch.no_grad():
        work = Workload(case, CPU)
        field, left_out = prepare(work)
        for name, prepared in field.items():
            for _ in range(3):
                prepared.call()
                prepared.restore()
            assert all(p.isfinite().all() for p in prepared.parameters), name
    assert set(left_out) == ({"bare step", "clip + step"} if "NaN" in situation else set())


def test_a_call_that_changes_gradients_gets_them_back():
    work = Workload(a_case(situation="clipping"), CPU)
    before = [g.clone() for g in work.grads]
    for name in ("torch foreach", "fastguard", "fastguard flat"):
        prepared = CONTENDERS[name](work)
        prepared.call()
        assert not torch.equal(prepared.parameters[0].grad, before[0])
        prepared.restore()
        for p, g in zip(prepared.parameters, before, strict=True):
            assert torch.equal(p.grad, g)


def test_peers_of_a_gpu_say_why_they_are_left_out():
    with pytest.raises(NotHere, match="CUDA"):
        CONTENDERS["apex"](Workload(a_case(), CPU))


# Cases and their byte models.


@pytest.mark.parametrize(
    ("changes", "read", "update"),
    [
        ({}, 1, 0),
        ({"situation": "clipping"}, 1, 1),
        ({"situation": "one NaN, zeroed"}, 1, 0),
        ({"optimizer": ("AdamW", "fused")}, 2, 3),
        ({"optimizer": ("SGD", "foreach")}, 2, 2),
        ({"optimizer": ("AdamW", "fused"), "situation": "clipping"}, 2, 4),
        ({"optimizer": ("AdamW", "fused"), "situation": "one NaN, skipped"}, 1, 0),
    ],
)
def test_byte_models(changes, read, update):
    case = a_case(**changes)
    g = case.grad_bytes
    assert (case.io.read, case.io.update) == (read * g, update * g)
    assert case.io.seconds(10.0, 20.0) == pytest.approx(read * g / 1e10 + 2 * update * g / 2e10)


def test_bytes_follow_the_dtype_of_each_parameter():
    elements = 280 + 7 + 30 + 300
    assert a_case().grad_bytes == 4 * elements
    assert a_case(dtype="bf16").grad_bytes == 2 * elements
    assert a_case(dtype="mixed").grad_bytes == 2 * 310 + 4 * 307


def test_a_workload_holds_what_its_case_says():
    case = a_case(dtype="mixed")
    work = Workload(case, CPU)
    assert [tuple(g.shape) for g in work.grads] == SHAPES
    assert sum(g.numel() * g.itemsize for g in work.grads) == case.grad_bytes
    flat = torch.cat([g.view(-1).double() for g in work.grads])
    assert work.true_norm == pytest.approx(float(flat.norm()), rel=1e-12)


def test_ids_of_the_suite_are_unique(benchmarks):
    for device in (CPU, torch.device("cuda")):
        ids = [case.id for case in benchmarks("suite").cases(device)]
        assert len(set(ids)) == len(ids)


def test_the_quick_selection_has_the_gpt2_of_the_shape_files(benchmarks):
    assert gpt2_shapes() == benchmarks("suite").model_shapes("gpt2-124m")
    assert all(case.baseline in case.contenders for case in selection(CPU))


def test_every_target_of_a_cpu_has_its_case_in_the_suite(benchmarks):
    # Rows with one and the same ratio for every case and contender: then only targets that look
    # for something that the suite does not measure stay without a number.
    rows = []
    for case in benchmarks("suite").cases(CPU):
        for name in case.contenders:
            rows.append(
                summarise(case, name, [Sample(1, 1, 1)], [Sample(2, 2, 2)], LIMIT, 0.0).as_dict()
            )
    memory = {"contender": "fastguard", "working_bytes": 1e6}
    accuracy = {
        "contender": "fastguard",
        "norm_error": 1e-9,
        "case": "",
        "dtype": "",
        "magnitude": 1,
    }
    result = {
        "machine": {"device": "cpu"}, "rows": rows, "memory": [memory], "accuracy": [accuracy],
    }  # fmt: skip
    verdicts = judge(result)
    assert [v["what"] for v in verdicts if v["device"] == "cpu" and v["met"] is None] == []
    assert all(v["measured"] == NOT_MEASURED for v in verdicts if v["device"] == "cuda")


# The runner.


def test_rounds_interleave_and_each_begins_with_another_contender():
    work = Workload(a_case(contenders=("torch foreach", "fastguard")), CPU)
    seen = []

    def watched(name):
        prepared = CONTENDERS[name](work)
        return replace(prepared, restore=lambda: seen.append(name))

    field = {name: watched(name) for name in work.case.contenders}
    samples = interleave(field, work, seconds=0.0)
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys(field, FEWEST_ROUNDS)
    first, second = work.case.contenders
    assert seen[:8] == [first, second, second, first, first, second, second, first]


def test_a_ratio_is_taken_within_a_round():
    baseline = [Sample(t, t, t) for t in (2.0, 20.0, 200.0)]
    own = [Sample(t, t, t) for t in (1.0, 10.0, 100.0)]
    row = summarise(a_case(), "fastguard", own, baseline, LIMIT, None)
    assert row.ratio == Spread(2.0, 2.0, 2.0)
    assert row.ms.p50 == 10.0
    assert row.limit_percent == pytest.approx(100 * a_case().grad_bytes / 1e10 / 10e-3)


def test_the_baseline_is_once_as_fast_as_itself():
    rows, left_out = run_case(a_case(), CPU, LIMIT, seconds=0.0)
    by_name = {row.contender: row for row in rows}
    assert set(by_name) == set(ON_CPU)
    assert set(left_out) == {"apex", "TransformerEngine"}
    assert by_name["torch foreach"].ratio == Spread(1.0, 1.0, 1.0)
    assert all(row.norm_error is not None and row.norm_error < 1e-6 for row in rows)


def test_a_peer_that_refuses_is_left_out_and_ours_is_not():
    rows, left_out = run_case(a_case(dtype="fp16"), CPU, LIMIT, seconds=0.0)
    assert "FP16" in left_out["GradScaler + clip"]
    assert "fastguard" in {row.contender for row in rows}

    def broken(work):
        raise AssertionError("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            CONTENDERS,
            "fastguard",
            lambda w: replace(CONTENDERS["torch foreach"](w), call=lambda: broken(w)),
        )
        with pytest.raises(AssertionError, match="broken"):
            run_case(a_case(), CPU, LIMIT, seconds=0.0)


def test_a_case_that_does_not_fit_is_left_out_with_the_reason():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastguard.bench.runner.available_bytes", lambda device: 1000)
        rows, left_out = run_case(a_case(), CPU, LIMIT)
    assert rows == []
    assert "memory" in left_out["fastguard"]


def test_preparation_is_not_timed():
    called = []
    sample = Clock(CPU).sample(lambda: called.append("call"), lambda: called.append("prepare"))
    assert called == ["prepare", "call"]
    assert sample.wall_ms == sample.host_ms == sample.device_ms


def test_ceilings_and_machine():
    found = ceilings(CPU, n_bytes=2**16)
    assert min(found.read_gb_s, found.update_gb_s, found.copy_gb_s) > 0
    machine = describe_machine(CPU)
    assert {"device", "cpu", "cores", "capability"} <= set(machine)
    assert slug_of({"device": "cpu", "cpu": "AMD EPYC", "cores": 2}) == "cpu-amd-epyc-2-cores"


# Accuracy, memory, growth.


def test_accuracy_sees_torch_overflow_and_not_us(benchmarks):
    rows = benchmarks("accuracy").measure_accuracy(
        a_case(contenders=("torch foreach", "fastguard")), CPU
    )
    by_key = {(r["magnitude"], r["values"], r["contender"]): r["norm_error"] for r in rows}
    assert by_key[1e20, "normal", "torch foreach"] == math.inf
    assert max(e for (_, _, name), e in by_key.items() if name == "fastguard") < 1e-7


def test_peak_memory_counts_what_a_call_holds_at_once(benchmarks):
    peak_bytes = benchmarks("memory").peak_bytes

    def two_at_once_then_one():
        a, b = torch.empty(1000), torch.empty(2000)
        del a, b
        torch.empty(500)

    assert peak_bytes(two_at_once_then_one, CPU) == 12_000


def test_fits_find_slope_and_exponent(benchmarks, result):
    growth = benchmarks("growth")
    made_up = copy.deepcopy(result)
    made_up["rows"] = []
    for n in growth.TENSORS:
        row = copy.deepcopy(result["rows"][0])
        ms = 1e-3 * n  # 1 µs a tensor
        row |= {"series": "tensors", "tensors": n, "contender": "fastguard"}
        row["host_ms"] = {"p20": ms, "p50": ms, "p80": ms}
        made_up["rows"].append(row)
    (fit,) = growth.fits(made_up)
    assert fit["slope"] == pytest.approx(1.0)
    assert fit["exponent"] == pytest.approx(1.0)


# Results: file, charts, table, comparison.


def test_a_result_survives_the_file(tmp_path, result):
    path = tmp_path / "result.json"
    save(result, path)
    again = load(path)
    assert again["rows"][0]["contender"] == "torch foreach"
    assert find(again, a_case().id, "fastguard")["tensors"] == len(SHAPES)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r.pop("machine"), "machine"),
        (lambda r: r.update(schema=99), "schema"),
        (lambda r: r.update(rows={}), "rows"),
        (lambda r: r["rows"][0].pop("io"), "io"),
        (lambda r: r["rows"][0].update(ratio={"p50": 1.0}), "p20"),
    ],
)
def test_what_is_no_result_is_refused_with_the_reason(result, spoil, says):
    spoiled = copy.deepcopy(result)
    check(spoiled)
    spoil(spoiled)
    with pytest.raises(ValueError, match=says):
        check(spoiled)


def test_committed_results_are_of_this_schema():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if "rows" in json.loads(path.read_text()):
            load(path)


def test_charts_come_from_the_file_alone_and_are_the_same_each_time(tmp_path, benchmarks, result):
    require("matplotlib")
    plots = benchmarks("plots")
    source = tmp_path / "some-machine.json"
    save(result, source)
    (tmp_path / "again").mkdir()
    drawn = plots.draw(source, tmp_path)
    charts = ("ratios", "steps", "roofline", "growth")
    names = {f"some-machine-{chart}.{suffix}" for chart in charts for suffix in ("png", "svg")}
    assert {path.name for path in drawn} == names
    for path in plots.draw(source, tmp_path / "again"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    foot = plots.source_of(result)
    assert result["date"][:10] in foot and "python -m benchmarks" in foot


def test_tables_name_every_case_contender_and_target(result):
    require("rich")
    from rich.console import Console

    from fastguard.bench.table import growth_table, row_table, target_table

    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    for table in (row_table(result), growth_table(result), target_table(result)):
        console.print(table)
    text = console.export_text()
    for column in ("case", "contender", "ratio p50 [p20..p80]", "% of limit", "norm error"):
        assert column in text
    for column in ("target", "measured"):
        assert column in text
    for name in (*ON_CPU, *STEPS):
        assert name in text
    assert NOT_MEASURED in text
    console.print(target_table(result, unmeasured=False))
    assert NOT_MEASURED not in console.export_text()


def slowed(result, factor, case=None):
    other = copy.deepcopy(result)
    for row in other["rows"]:
        if case is None or row["case"] == case:
            row["ratio"] = {key: value * factor for key, value in row["ratio"].items()}
    return other


def steady(result):
    """The result with narrow spreads, as a quiet machine gives."""
    other = copy.deepcopy(result)
    for row in other["rows"]:
        p50 = row["ratio"]["p50"]
        row["ratio"] = {"p20": p50 * 0.99, "p50": p50, "p80": p50 * 1.01}
    return other


def test_compare_flags_what_got_slower_outside_its_spread(benchmarks, result):
    compare = benchmarks("compare").compare
    old = steady(result)
    assert not any(c.flagged for c in compare(old, old))
    changes = compare(old, slowed(old, 0.7, a_case().id))
    flagged = {(c.case, c.contender) for c in changes if c.flagged}
    ours = {"fastguard", "fastguard flat", "fastguard flat trusted"}
    assert flagged == {(a_case().id, name) for name in ours}
    assert {c.verdict for c in compare(old, slowed(old, 1.5))} == {"faster"}
    assert not any(c.flagged for c in compare(old, slowed(old, 0.97)))  # within the tolerance


def test_compare_believes_no_change_within_the_spread(benchmarks, result):
    old = steady(result)
    for row in old["rows"]:
        row["ratio"] |= {"p20": row["ratio"]["p50"] * 0.5, "p80": row["ratio"]["p50"] * 2}
    assert not any(c.flagged for c in benchmarks("compare").compare(old, slowed(old, 0.7)))


def test_compare_flags_a_norm_that_got_worse(benchmarks, result):
    worse = copy.deepcopy(result)
    row = find(worse, a_case().id, "fastguard")
    for bad in (1e-3, "Infinity"):
        row["norm_error"] = bad
        (flagged,) = [c for c in benchmarks("compare").compare(result, worse) if c.flagged]
        assert flagged.verdict == "NORM"


def test_compare_says_by_its_exit_status_what_it_found(tmp_path, benchmarks, result, capsys):
    main = benchmarks("compare").main
    old, slow, broken = (str(tmp_path / f"{name}.json") for name in ("old", "slow", "broken"))
    save(steady(result), Path(old))
    save(slowed(steady(result), 0.5), Path(slow))
    Path(broken).write_text("{")
    assert main([old, old]) == 0
    assert main([old, slow]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main([old, broken]) == 2
    assert "broken.json" in capsys.readouterr().err


def test_compare_runs_as_a_script_from_any_folder(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "compare.py",
        "no-such-file.json",
        "other.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-file.json" in done.stderr and "Traceback" not in done.stderr


def test_row_fields_are_plain_json(result):
    assert json.loads(json.dumps(result["rows"][0]))["case"] == a_case().id
    assert set(result["rows"][0]) == set(Row.__annotations__)
