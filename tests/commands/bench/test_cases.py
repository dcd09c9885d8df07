"""The byte models and workloads of the cases are correct, and the suite covers every target."""

import pytest
import torch

from fastguard.commands.bench import Workload
from fastguard.commands.bench.clock import Sample
from fastguard.commands.bench.runner import summarize
from fastguard.commands.bench.selection import gpt2_shapes, selection
from guardtest.bench import CPU, LIMIT, SHAPES, a_case


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
def test_byte_models_of_all_situations(changes, read, update):
    case = a_case(**changes)
    g = case.grad_bytes
    assert (case.io.read, case.io.update) == (read * g, update * g)
    assert case.io.seconds(10.0, 20.0) == pytest.approx(read * g / 1e10 + 2 * update * g / 2e10)


def test_gradient_bytes_depend_on_the_dtype_of_each_parameter():
    elements = 280 + 7 + 30 + 300
    assert a_case().grad_bytes == 4 * elements
    assert a_case(dtype="bf16").grad_bytes == 2 * elements
    assert a_case(dtype="mixed").grad_bytes == 2 * 310 + 4 * 307


def test_a_workload_has_the_shapes_and_bytes_of_its_case():
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


def test_the_quick_selection_uses_the_gpt2_shapes_of_the_suite(benchmarks):
    assert gpt2_shapes() == benchmarks("suite").model_shapes("gpt2-124m")
    assert all(case.baseline in case.contenders for case in selection(CPU))


def test_the_suite_measures_every_cpu_target(benchmarks):
    # Every case and contender gets a row, so a target without a number is a target that the suite
    # does not measure.
    rows = []
    for case in benchmarks("suite").cases(CPU):
        for name in case.contenders:
            rows.append(
                summarize(case, name, [Sample(1, 1, 1)], [Sample(2, 2, 2)], LIMIT, 0.0).as_dict()
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
    targets = benchmarks("targets")
    verdicts = targets.judge(result)
    assert [v["what"] for v in verdicts if v["device"] == "cpu" and v["met"] is None] == []
    assert all(v["measured"] == targets.NOT_MEASURED for v in verdicts if v["device"] == "cuda")


def test_shape_lists_of_another_library_have_its_element_counts(benchmarks):
    suite = benchmarks("suite")
    cases = {case.name: case for case in suite.cases(torch.device("cuda"))}
    matrices, one = cases["500 matrices"], cases["1 x 1536M"]
    assert (len(matrices.shapes), matrices.elements) == (500, 225_181_696)
    assert matrices.grad_bytes == 2 * 359 * 2**19 + 4 * 141 * 2**18
    assert (one.elements, one.grad_bytes) == (1_536_066_816, 3_072_133_632)
