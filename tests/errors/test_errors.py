"""Errors name parameters and counts, and stay short if the whole model is NaN."""

from fastguard import NonFiniteGradError, TrainingDivergedError
from fastguard.errors import describe_culprits


def test_counts_that_are_zero_are_not_mentioned():
    culprits = [("w", 2, 1, 0), ("b", 0, 0, 7)]
    assert describe_culprits(culprits) == "w (2 NaN, 1 +Inf), b (7 -Inf)"


def test_eight_parameters_are_named_and_the_rest_are_counted():
    text = describe_culprits([(f"p{i}", 1, 0, 0) for i in range(10)])
    assert "p7 (1 NaN) and 2 more" in text and "p8" not in text
    assert describe_culprits([("p", 1, 0, 0)], 31).endswith(" and 30 more")


def test_both_errors_are_caught_as_torchs_own():
    for error in (NonFiniteGradError, TrainingDivergedError):
        raised = error("message", [("w", 1, 0, 0)])
        assert isinstance(raised, RuntimeError)
        assert raised.culprits == [("w", 1, 0, 0)]
        assert error("message").culprits == []
