"""Models, batches and arguments that `explain_nonfinite` accepts or refuses."""

import pytest
import torch
from torch import nn

import fastguard
from fastguard import explain_nonfinite
from guardtest.chains import Call, chain, mean, zeros


def test_a_healthy_batch_gives_an_empty_report():
    report = explain_nonfinite(chain(), (torch.randn(2, 4), None), mean)
    assert (report.found, report.already, report.bad_gradients) == (False, (), ())
    assert "rng=" in str(report)


def test_a_compiled_model_is_replayed_eagerly():
    model = torch.compile(chain(Call(torch.log)), backend="eager")
    report = explain_nonfinite(model, zeros(), mean)
    assert report.module == "1 (Call)"


def test_an_activation_guard_does_not_hide_the_origin():
    model = chain(Call(torch.log))
    with fastguard.ActivationGuard(model, mode="clean") as guard:
        assert model(zeros()[0]).isfinite().all()
        counted = guard.counts()
        report = explain_nonfinite(model, zeros(), mean)
        assert guard.counts() == counted
    assert report.operation == "aten.log.default"


def test_the_origin_in_a_checkpointed_part_is_found():
    def part(x):
        return torch.utils.checkpoint.checkpoint(lambda y: y.abs().sqrt(), x, use_reentrant=False)

    report = explain_nonfinite(chain(Call(part)), zeros(), mean)
    assert (report.origin, report.operation) == ("backward", "SqrtBackward0")


@pytest.mark.parametrize("batch", [torch.zeros(2), (1, 2, 3), None], ids=["tensor", "3", "none"])
def test_an_unsupported_batch_raises_type_error(batch):
    with pytest.raises(TypeError, match=r"pass \(inputs, targets\)"):
        explain_nonfinite(nn.Linear(2, 2), batch, mean)


def test_loss_fn_and_step_together_raise_type_error():
    with pytest.raises(TypeError, match="both"):
        explain_nonfinite(nn.Linear(2, 2), zeros(), mean, step=lambda m, b: None)


def test_a_root_of_negative_numbers_gets_its_own_remedy():
    report = explain_nonfinite(chain(Call(lambda x: (x.abs() - 100).sqrt())), zeros(), mean)
    assert report.operation == "aten.sqrt.default"
    assert "clamp_min(0)" in report.remedy and "negative" in report.evidence


def test_an_empty_batch_is_explained_as_a_mean_of_no_values():
    batch = torch.zeros(0, 4), torch.zeros(0, 1)
    report = explain_nonfinite(nn.Linear(4, 1), batch, nn.functional.mse_loss)
    assert report.kind == "mean of nothing" and "is empty" in report.evidence
