"""In `benchmarks/training_step.py` the model is GPT-2, and all compared steps do the same work."""

import functools
import json

import pytest
import torch

from fastguard.commands.bench.runner import MIN_ROUNDS
from guardtest.bench import CPU, ROOT

MEANT_TO_SKIP = {"clip + isfinite(norm) + step", "isfinite + clip + step", "GuardedOptimizer"}


@pytest.fixture
def script(benchmarks, monkeypatch):
    """The script, with a compiler backend that needs no C++."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    return benchmarks("training_step")


def ways_of(script):
    return list(script.ways_to_step(torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)])))


def run(script, monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["training_step", "--quick", *options])
    return script.main()


def test_the_model_is_gpt2_124m(script):
    listed = json.loads((ROOT / "benchmarks" / "shapes" / "gpt2-124m.json").read_text())
    expected = [torch.Size(shape) for _, shape in listed["parameters"]]
    size = script.Size()
    with torch.device("meta"):
        model = size.model()
    found = [p.shape for p in model.parameters()]
    padded = {torch.Size((50257, size.width)): torch.Size((size.vocabulary, size.width))}
    # GPT-2 stores its linear layers transposed.
    assert sorted(map(sorted, found)) == sorted(sorted(padded.get(s, s)) for s in expected)


def test_the_script_runs_on_a_cpu(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "training.json"
    assert run(script, monkeypatch, "--device", "cpu", "--out", str(out)) == 0
    document = json.loads(out.read_text())
    assert document["failures"] == {}
    assert [(row["mode"], row["way"]) for row in document["rows"]] == [
        (mode, way) for mode in script.MODES for way in ways_of(script)
    ]
    for row in document["rows"]:
        assert row["rounds"] >= MIN_ROUNDS and row["ms"]["p50"] > 0
        if row["way"] == script.BARE:
            assert row["added_percent"]["p50"] == 0.0
    assert "| compiled | GuardedOptimizer |" in capsys.readouterr().out


def test_a_failing_mode_is_named_and_the_others_run(script, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", broken)
    out = tmp_path / "training.json"
    assert run(script, monkeypatch, "--device", "cpu", "--out", str(out)) == 1
    document = json.loads(out.read_text())
    assert document["failures"] == {"compiled": "RuntimeError: no compiler"}
    assert {row["mode"] for row in document["rows"]} == {"eager"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_script_without_a_gpu_explains_what_to_do(script, monkeypatch, capsys):
    assert run(script, monkeypatch) == 2
    printed = capsys.readouterr().err
    assert "--device cpu" in printed and "--quick" in printed


def test_all_ways_clip_alike_and_guarded_ones_skip_nan(script):
    """All compared steps do the same work."""
    stepped = {}
    for name in ways_of(script):
        torch.manual_seed(0)
        model = script.TINY.model().to(CPU)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        end = script.ways_to_step(model, inner)[name]
        for bad in (False, True):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5)
            if bad:
                model.norm.bias.grad[0] = torch.nan
            before = [p.detach().clone() for p in model.parameters()]
            end(torch.ones(()))
            skipped = all(map(torch.equal, model.parameters(), before))
            assert skipped is (bad and name in MEANT_TO_SKIP)
            if not bad:
                moved = torch.cat(
                    [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
                )
                stepped[name] = moved.detach().double().norm().item()
    assert stepped.pop(script.BARE) > 10
    assert stepped == {name: pytest.approx(script.MAX_NORM, rel=1e-4) for name in stepped}
