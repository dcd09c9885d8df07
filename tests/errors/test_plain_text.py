"""Any names, tags and messages reach terminals and logs as one line of printable text."""

from __future__ import annotations

import io
import logging

import pytest
import torch

import fastguard
from fastguard import GuardedOptimizer, NonFiniteGradError, StepRecord
from fastguard.errors import describe_culprits
from fastguard.errors.plain_text import printable, shown

HOSTILE = {
    "escape code": "\x1b[2J",
    "escape code of one character": "\x9b2J",
    "carriage return": "\rstep 2 applied",
    "line feed": "\nstep 2 applied",
    "line separator": "\u2028step 2 applied",
    "bell": "\a",
    "override": "\u202edeilppa",
    "isolate": "\u2066",
    "no width": "\u200b",
    "tag character": "\U000e0041",
    "no utf-8": "\udce9",
    "null": "\0",
}


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE.keys())
def hostile(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_is_plain(text: str) -> None:
    assert text.isprintable() and text.encode()


def test_every_character_that_is_not_printable_is_escaped(hostile: str) -> None:
    text = printable(f"head{hostile}.weight")
    assert_is_plain(text)
    assert text == f"head{hostile!r}.weight".replace("'", "")


def test_letters_of_all_scripts_and_spaces_are_kept() -> None:
    assert printable("größe\tπ 損失\u3000\xa0é👍") == "größe π 損失  é👍"


def test_text_is_shortened_to_a_limit() -> None:
    assert printable("x" * 100, 10) == "x" * 9 + "…"
    assert len(shown([0] * 10**5)) == 60 and len(shown([0] * 10**5, 200)) == 200


@pytest.mark.parametrize(
    "value",
    [
        [], (), {}, set(), [[]], (1,), ([1, "it's"], {"a": (None, 2.5)}), {1: {2: {3: []}}},
        [b"x", {4}, torch.Size([1, 2])], "it's",
    ],
    ids=repr,
)  # fmt: skip
def test_short_values_are_shown_as_their_repr(value: object) -> None:
    assert shown(value, 200) == repr(value)


def test_only_the_beginning_of_a_large_value_is_formatted() -> None:
    tower: object = 1.5
    deep: list = []
    for _ in range(100_000):
        tower, deep = [tower, (tower,), {"a": tower}], [deep]
    deep.append(deep)
    assert shown(tower) == "[" * 59 + "…"
    assert shown(deep) == "[" * 59 + "…"
    assert shown([tower] * 3, 4) == "[[[…"
    assert shown(["x" * 10**6] * 10**6, 8) == "['xxxxx…"


class Raises:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Deep:
    def __repr__(self) -> str:
        return f"<{Deep()!r}>"


def test_values_that_cannot_be_shown_are_marked() -> None:
    assert shown(Raises()) == "<Raises that cannot be shown: RuntimeError>"
    assert shown([Deep()]) == "<list that cannot be shown: RecursionError>"
    assert shown(Raises(), form=str) == shown(Raises())


@pytest.fixture
def written() -> io.StringIO:
    """Returns the output of a plain handler of the logger `fastguard`."""
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("fastguard")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def lines(stream: io.StringIO) -> list[str]:
    text = stream.getvalue()
    assert text.endswith("\n")
    return text[:-1].split("\n")


def guarded(name: str = "w", **options: object) -> tuple[torch.nn.Parameter, GuardedOptimizer]:
    weight = torch.nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([weight], lr=1.0)
    return weight, GuardedOptimizer(inner, named_parameters=[(name, weight)], **options)


def test_names_losses_and_tags_of_a_skipped_step_make_one_line(
    hostile: str, written: io.StringIO
) -> None:
    weight, opt = guarded(f"w{hostile}")
    weight.grad = torch.tensor([float("nan")])
    opt.step(loss={f"a{hostile}": torch.tensor(float("nan"))}, tag={"file": hostile})
    (line,) = lines(written)
    assert_is_plain(line)
    assert line.startswith("fastguard: step 1 skipped")


def test_an_error_names_parameters_and_losses_in_one_line(hostile: str) -> None:
    weight, opt = guarded(f"w{hostile}", nonfinite="raise")
    weight.grad = torch.tensor([float("nan")])
    with pytest.raises(NonFiniteGradError) as raised:
        opt.step()
    assert_is_plain(str(raised.value))
    assert raised.value.culprits[0][0] == f"w{hostile}"  # programs get the unchanged name
    weight.grad = torch.zeros(1)
    with pytest.raises(NonFiniteGradError) as raised:
        opt.step(loss={f"a{hostile}": torch.tensor(float("inf"))})
    assert_is_plain(str(raised.value))


def test_a_very_long_name_is_shortened_in_the_message() -> None:
    assert len(describe_culprits([("x" * 10**6, 1, 0, 0)] * 8)) < 4000


def test_messages_of_sinks_that_fail_are_plain_text_too(hostile: str, written: io.StringIO) -> None:
    def fails(record: StepRecord) -> None:
        raise ValueError(f"no such metric: {hostile}")

    weight, opt = guarded()
    weight.grad = torch.ones(1)
    opt.add_sink(fails)
    opt.step()
    first, *traceback = lines(written)
    assert first.startswith("fastguard: records are being lost: ")
    for line in (first, *traceback):
        assert_is_plain(line)
    assert any(line.startswith("ValueError: no such metric: ") for line in traceback)
    assert not any(line.startswith("step 2 applied") for line in traceback)


def test_a_sink_whose_repr_fails_does_not_end_the_run(written: io.StringIO) -> None:
    class Sink:
        def __repr__(self) -> str:
            return repr(self)  # recurses up to the limit

        def __call__(self, record: StepRecord) -> None:
            raise ConnectionError("no network")

    weight, opt = guarded()
    weight.grad = torch.ones(1)
    opt.add_sink(Sink())
    opt.step()
    assert opt.applied_steps == 1
    assert "<Sink that cannot be shown: RecursionError> raised" in written.getvalue()


def test_a_log_argument_whose_str_fails_does_not_end_the_run(
    written: io.StringIO,
) -> None:
    logging.getLogger("fastguard").warning("the file %s, step %d", Raises(), 3)
    (line,) = lines(written)
    assert line == "fastguard: the file %s, step %d (RuntimeError in showing the values)"


def test_messages_that_are_plain_keep_their_arguments(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("fastguard").warning("step %d of %s", 3, "é")
    (record,) = caplog.records
    assert record.args == (3, "é")  # services that group messages do so by the template


def assert_are_plain(text: str, n_lines: range) -> None:
    found = text.split("\n")
    assert len(found) in n_lines
    for line in found:
        assert line.isprintable()
        assert not line.startswith("step 2 applied")


def model_with(name: str, weight: float) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    model._modules[f"head{name}"] = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model[1].weight.fill_(weight)
    return model


def test_the_explanation_of_a_bad_step_is_plain_text(hostile: str) -> None:
    model = model_with(hostile, float("nan"))
    report = fastguard.explain_nonfinite(
        model, {f"x{hostile}": torch.ones(3, 2)}, step=lambda m, b: m(*b.values()).sum()
    )
    assert "head" in str(report)
    assert_are_plain(str(report), range(2, 30))


def test_a_diagnosis_is_plain_text(hostile: str) -> None:
    model = model_with(hostile, 1e30)
    inputs = {f"x{hostile}": torch.full((3, 2), 1e30)}
    diagnosis = fastguard.diagnose(model, inputs, step=lambda m, b: m(*b.values()).square().sum())
    assert any("head" in finding.where for finding in diagnosis)
    assert_are_plain(str(diagnosis), range(2, 60))
    assert diagnosis.to_json().replace("\n", "").isprintable()


def test_meters_and_batch_checks_print_plain_text(hostile: str) -> None:
    meter = fastguard.LossMeter()
    meter.update({f"a{hostile}": torch.tensor(float("nan"))}, tag=hostile)
    assert_are_plain(str(meter), range(1, 4))
    checked = fastguard.check_batch({f"x{hostile}": torch.tensor([float("nan")])})
    assert_are_plain(str(checked), range(1, 3))
    model = model_with(hostile, float("nan"))
    with fastguard.ActivationGuard(model) as guard:
        model(torch.ones(3, 2))
        assert_are_plain(str(guard), range(1, 4))


def test_an_error_that_names_a_gradient_is_plain_text(hostile: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    inner = torch.optim.SGD([weight], lr=1.0)
    opt = GuardedOptimizer(inner, named_parameters=[(f"w{hostile}", weight)])
    weight.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(TypeError, match="is sparse") as raised:
        opt.step()
    assert_are_plain(str(raised.value), range(1, 2))
