"""Findings about watched steps: injected faults are reported, healthy runs are not."""

import math
import random
import tracemalloc

import pytest

import fastguard
from fastguard import StepRecord
from fastguard.commands.report.layer_history import COLUMNS, MAX_LAYERS, LayerHistory
from fastguard.commands.report.summary import summarize
from fastguard.commands.report.verdict import judge
from fastguard.commands.report.watched import Watched
from fastguard.records.layers import layer_norms, layer_ratios
from fastguard.records.read_json_lines import Block
from guardtest import require

LAYERS = [f"blocks.{i}.mlp" for i in range(12)]


def record(step, watch=None):
    return StepRecord(step, 1.0, 1.0, "applied", watch=watch or {}).as_dict()


def norms_at(step, grown=(), rng=random):
    """Gradient norms of a noisy run; `grown` grow by 5 % per step from step 2,000 on."""
    return {
        f"{layer}.weight": 0.1
        * math.exp(rng.gauss(0, 0.4))
        * (1.05 ** max(0, step - 2000) if layer in grown else 1.0)
        for layer in LAYERS
    }


def summary_of(watch_at, steps=2300, every=10):
    records = [record(s, watch_at(s) if s % every == 1 else None) for s in range(1, steps + 1)]
    return summarize([Block(records, 0, 0)])


def findings(watch_at, **more):
    return judge(summary_of(watch_at, **more)).findings


def test_the_layer_that_grew_first_is_named():
    def watch_at(step):
        name = "blocks.3.mlp.weight"
        later = norms_at(step - 100, grown=LAYERS[5:])
        return {"tensor_norms": later | {name: norms_at(step, LAYERS)[name]}}

    (finding,) = [text for text in findings(watch_at) if "grew first" in text]
    assert finding.startswith("Layer “blocks.3.mlp” grew first: at step 2,0")
    assert finding.endswith("7 other layers followed.")


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_layer_that_grew(seed):
    rng = random.Random(seed)

    def watch_at(step):
        warm_up = 1 + 20 * math.exp(-step / 100)
        return {"tensor_norms": {k: warm_up * v for k, v in norms_at(step, rng=rng).items()}}

    assert findings(watch_at) == []


def test_a_single_outlier_is_not_growth_unless_the_run_ends_there():
    def run(until):
        history = LayerHistory()
        for step in range(1, until):
            history.add(step, {"head": 50.0 if step == 20 else 1.0})
        return history.growths()

    assert run(30) == []
    assert run(21) == [(20, "head", pytest.approx(50.0))]


def test_layers_with_too_large_or_too_small_updates_are_named():
    def watch_at(step):
        ratios = {f"{layer}.weight": 1e-3 for layer in LAYERS}
        return {"update_ratio": ratios | {"head.weight": 0.08, "embed.weight": 1e-7}}

    large, small = findings(watch_at)
    assert large.startswith("Layers with large updates") and large.endswith("“head” 0.08.")
    assert small.startswith("Layers that hardly change") and small.endswith("“embed” 1e-07.")


def test_a_learning_rate_that_decays_to_zero_is_not_reported():
    def watch_at(step):
        return {"update_ratio": {"head.weight": 2e-3 * (1.0001 - step / 2300)}}

    assert findings(watch_at) == []


def test_noise_scale_and_underflow_are_reported():
    def watch_at(step):
        lost = {"float16": 0.2 if step == 101 else 0.01, "bfloat16": 0.0}
        return {"noise_scale": 7.6, "underflow": lost | {"exponents": {"-8": 3}}}

    batch, lost = findings(watch_at)
    assert batch.startswith("The batch could be about 8 times as large")
    assert "20.0% in float16 (step 101)" in lost and "bfloat16" not in lost


def drift(step, weights):
    record = StepRecord(
        step,
        1.0,
        1.0,
        "applied",
        reason="replica_drift" if weights else None,
        watch={"replica_drift": {"gradients": [], "weights": weights}},
    )
    return record.as_dict()


def test_the_rank_that_differs_is_named():
    records = [record(s) if s % 10 else drift(s, [2] if s > 500 else []) for s in range(1, 600)]
    summary = summarize([Block(records, 0, 0)])
    verdict = judge(summary)
    assert verdict.headline == (
        "9 incidents in 599 steps; the replicas differed when they were last compared."
    )
    assert not verdict.survived
    cause, found = verdict.findings
    assert cause.startswith("Likely cause (9 of 9 incidents): replicas that must be equal differ")
    assert found == (
        "The weights of rank 2 differ from the other ranks in 9 watched steps. Restore a "
        "checkpoint from before step 510."
    )
    assert {row.first.drifts for row in summary.table.rows} == {
        ("the weights of rank 2 differ from the other ranks",)
    }


def test_replicas_that_are_equal_again_have_survived():
    steps = {510: [0, 1], 520: [0, 1], 530: []}
    records = [drift(s, steps[s]) if s in steps else record(s) for s in range(1, 600)]
    verdict = judge(summarize([Block(records, 0, 0)]))
    assert verdict.survived
    assert (
        "The weights of 2 ranks differ in 2 watched steps, but not in the last step that compared "
        "the replicas. Restore a checkpoint from before step 510."
    ) in verdict.findings


HOSTILE = [
    5, "text", [1], {"tensor_norms": 5}, {"tensor_norms": {"a": "NaN", "b": None, "c": [1]}},
    {"tensor_norms": {"a.w": -1.0, "b.w": 0, "c.w": True, "d.w": 1e308, "d.b": 1e308}},
    {"update_ratio": {"a": 10**400}}, {"noise_scale": "Infinity"}, {"noise_scale": 10**400},
    {"underflow": {"float16": "NaN", "x": {}}}, {"underflow": [1]}, {"replica_drift": {"w": 5}},
]  # fmt: skip


@pytest.mark.parametrize("watch", HOSTILE, ids=str)
def test_odd_values_are_ignored(watch):
    row = record(1) | {"watch": watch}
    verdict = judge(summarize([Block([row] * 20, 0, 0)]))
    assert verdict.headline == "No incident in 20 steps."
    if require("plotly"):
        from fastguard.commands.report.figure import draw

        draw(summarize([Block([row] * 20, 0, 0)]))


@pytest.mark.parametrize("watch", HOSTILE, ids=str)
def test_odd_values_do_not_hide_an_incident(watch):
    row = record(1) | {"watch": watch, "reason": "replica_drift"}
    assert judge(summarize([Block([row], 0, 0)])).headline.startswith("1 incident in 1 step")


def test_names_are_printed_on_one_line():
    watched = Watched()
    for step in range(30):
        watched.add(step, {"tensor_norms": {"a\n\x1b[2Jb.weight": 1.0 if step < 20 else 1e3}})
    (finding,) = watched.findings()
    assert "\n" not in finding and "\x1b" not in finding


def test_memory_is_bounded():
    history = LayerHistory()
    tracemalloc.start()
    for step in range(0, 200_000, 100):
        history.add(step, {f"layer{(step + i) % 5000}": 1.0 for i in range(200)})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(history.layers) == MAX_LAYERS and len(history.columns) <= COLUMNS
    assert held < 10e6


def test_columns_keep_the_largest_value_and_its_step():
    history = LayerHistory()
    for step in range(1000):
        history.add(step, {"a": 1.0 + (step == 777)})
    assert history.shift == 4
    assert history.cells("a")[777 >> 4] == (2.0, 777)
    assert [step for _, step in history.columns] == list(range(0, 1000, 16))


def test_a_guarded_run_is_drawn_in_heat_maps(tmp_path):
    """The layer with a too large learning rate is red in the figure of a real run."""
    import torch

    drawing = require("fastguard.commands.report.figure")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    opt = fastguard.GuardedOptimizer(
        torch.optim.AdamW(groups, lr=1e-4),
        named_parameters=model.named_parameters(),
        watch=("tensor_norms", "update_ratio"),
        watch_every=1,
    )
    records = []
    for _ in range(12):
        model(torch.randn(16, 8)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        records += [r.as_dict() for r in opt.records()]
    summary = summarize([Block(records, 0, 0)])
    assert any("large updates" in text and "“2”" in text for text in judge(summary).findings)
    norms, ratios = [t for t in drawing.draw(summary).data if t.meta == "watched"]
    assert len(norms.x) == 13 and len(norms.z) == 2
    assert ratios.z[1].max() > 1.0 > abs(ratios.z[0]).max()


def test_parameters_are_joined_by_layer():
    assert layer_norms({"tensor_norms": {"a.w": 3, "a.b": 4.0, "c": 1.0}}) == {"a": 5.0, "c": 1.0}
    assert layer_ratios({"update_ratio": {"a.w": 3e-3, "a.b": 4e-3}}) == {"a": 4e-3}
    assert layer_norms({}) == layer_ratios({}) == {}
