"""`GuardConfig`: strict settings from dicts, TOML and YAML."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard import GuardConfig, JsonLinesSink, SpikeRule, Threshold, read_records
from guardtest import require

TOML = """
[guard]
max_norm = 1
clip_scope = "group"
max_consecutive_skips = 20

[spike.grad_norm]
max = 100.0

[spike.seg]
window = 64
sigma = 5
warmup = 32
action = "record"

[groups."latents.*"]
max_norm = 0.5
clip_value = 10.0

[schedule]
floor = 1e-6
backoff = 0.5
recovery = 50
warmup = {steps = 10, lr = [0.1, 0.0], momentum = 0.8}

[rollback]
every = 10
after_skips = 3

[checkpoints]
directory = "checkpoints"
keep = 5
mode = "max"
ignore = ["*.mask"]

[batch]
low = -1
high = {inputs = 1.0, targets = 9}

[activations]
mode = "clean"
limit = 10.0
modules = ["decoder*"]

[records]
jsonl = "records.jsonl"
"""

YAML = """
guard: {max_norm: 1, clip_scope: group, max_consecutive_skips: 20}
spike:
  grad_norm: {max: 100.0}
  seg: {window: 64, sigma: 5, warmup: 32, action: record}
groups:
  "latents.*": {max_norm: 0.5, clip_value: 10.0}
schedule:
  floor: 0.000001
  backoff: 0.5
  recovery: 50
  warmup: {steps: 10, lr: [0.1, 0.0], momentum: 0.8}
rollback: {every: 10, after_skips: 3}
checkpoints: {directory: checkpoints, keep: 5, mode: max, ignore: ["*.mask"]}
batch: {low: -1, high: {inputs: 1.0, targets: 9}}
activations: {mode: clean, limit: 10.0, modules: ["decoder*"]}
records: {jsonl: records.jsonl}
"""


class Sdf(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = torch.nn.Embedding(5, 3)
        self.decoder = torch.nn.Linear(3, 1)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.latents(i))


def test_toml_and_yaml_give_the_same_configuration(tmp_path: Path) -> None:
    require("yaml")
    (tmp_path / "guard.toml").write_text(TOML)
    (tmp_path / "guard.yaml").write_text(YAML)
    config = GuardConfig.from_file(tmp_path / "guard.toml")
    assert config == GuardConfig.from_file(tmp_path / "guard.yaml")
    assert config.spike == {
        "grad_norm": Threshold(max=100.0),
        "seg": SpikeRule(window=64, sigma=5.0, warmup=32, action="record"),
    }


def test_every_setting_takes_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guard.toml").write_text(TOML)
    config = GuardConfig.from_file("guard.toml")
    model = Sdf()
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    assert opt.rules == config.spike and opt.max_consecutive_skips == 20
    assert [len(g["params"]) for g in opt.param_groups] == [1, 2]
    assert opt.param_groups[0]["max_norm"] == 0.5 and "max_norm" not in opt.param_groups[1]
    lr = config.lr(opt)
    assert [g["lr"] for g in opt.param_groups] == [0.1, 1e-6]
    assert opt.param_groups[0]["momentum"] == 0.8
    store = config.open_store()
    assert store is not None and store.directory == tmp_path / "checkpoints" and store.keep == 5
    rollback = config.rollback_for(opt, {"model": model}, lr, store)
    assert rollback is not None and rollback.every == 10
    assert rollback.lr is lr
    assert [entry.step for entry in store.list()] == [0]  # the snapshot before the first step
    store.save(state={"mask": torch.tensor(math.inf)}, step=1, metric=0.5)
    assert store.last().clean  # the NaN is in an ignored tensor
    store.save(state={}, step=2, metric=0.4)
    assert store.best().step == 1  # the largest metric
    check = config.check((torch.tensor([-2.0, 0.5]), torch.tensor([3, 12])))
    assert str(check) == "inputs goes down to -2, below -1\ntargets goes up to 12, above 9"
    activations = config.guard_activations(model)
    assert activations is not None

    model(torch.arange(5)).sum().backward()
    opt.step(loss={"seg": math.nan})
    lr.step()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.1, 1e-6])
    assert [r.reason for r in read_records("records.jsonl")] == ["nonfinite_loss"]
    activations.remove()


def test_the_schedule_is_built_as_configured() -> None:
    model = Sdf()
    config = GuardConfig.from_dict({"schedule": {"floor": 0.3, "backoff": 0.5, "recovery": 2}})
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
    lr = config.lr(opt, torch.optim.lr_scheduler.ExponentialLR(opt, gamma=1.0))
    seen = []
    for loss in (math.nan, math.nan, 1.0, 1.0):
        opt.step(loss=loss)
        lr.step()
        seen.append(opt.param_groups[0]["lr"])
    assert seen == [0.5, 0.3, 0.3, 0.5]


def test_records_go_where_the_configuration_says(tmp_path: Path) -> None:
    require("tensorboard")
    path = tmp_path / "r.jsonl"
    records = {
        "jsonl": str(path),
        "max_bytes": 1024,
        "keep": 1,
        "tensorboard": str(tmp_path / "tb"),
    }
    model = Sdf()
    config = GuardConfig.from_dict({"records": records})
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(20):
        opt.step(loss=1.0)
    assert len(list(tmp_path.glob("r.*.jsonl"))) == 1
    assert list((tmp_path / "tb").iterdir())


def test_sections_left_out_build_nothing() -> None:
    model = Sdf()
    config = GuardConfig.from_dict({})
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert opt.max_norm is None and len(opt.param_groups) == 1
    assert config.rollback_for(opt, {}) is None and config.guard_activations(model) is None
    assert config.open_store() is None and config.check(torch.ones(2)) is None


def test_the_split_optimizer_still_trains_every_parameter_once() -> None:
    model = Sdf()
    config = GuardConfig.from_dict({"groups": {"*bias": {"clip_value": 1.0}}})
    opt = config.wrap(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    params = [id(p) for g in opt.param_groups for p in g["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters())
    assert all(g["lr"] == 0.01 for g in opt.param_groups)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"records": {"jsonl": "/proc/nowhere/r.jsonl"}}, OSError),
        ({"records": {"jsonl": "r.jsonl", "tensorboard": "/proc/nowhere"}}, OSError),
        ({"records": {"jsonl": "r.jsonl"}, "groups": {"*": {"max_norm": 1.0}}}, ValueError),
    ],
    ids=["jsonl", "tensorboard", "guard"],
)
def test_a_wrap_that_fails_changes_nothing(
    settings, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("tensorboard")
    monkeypatch.chdir(tmp_path)
    closed: list[JsonLinesSink] = []
    monkeypatch.setattr(JsonLinesSink, "close", lambda sink: closed.append(sink))
    model = Sdf()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    groups, hooks = inner.param_groups, len(inner._optimizer_step_pre_hooks)
    config = GuardConfig.from_dict({"groups": {"*bias": {"clip_value": 1.0}}, **settings})
    with pytest.raises(error):
        config.wrap(model, inner)
    assert inner.param_groups is groups and len(groups) == 1
    assert len(inner._optimizer_step_pre_hooks) == hooks
    assert len(closed) == (settings["records"]["jsonl"] == "r.jsonl")


def test_groups_set_limits_of_some_parameters() -> None:
    """The first matching pattern applies; settings that a section omits keep the group's value."""
    model, other = Sdf(), torch.nn.Parameter(torch.zeros(1))
    groups = {"decoder.*": {"clip_value": 1.0}, "*": {"max_norm": 2.0}}
    config = GuardConfig.from_dict({"guard": {"clip_scope": "group"}, "groups": groups})
    given = {"params": [*model.parameters(), other], "max_norm": 5.0}  # `other` has no name
    opt = config.wrap(model, torch.optim.SGD([given], lr=0.1))
    found = [
        (len(g["params"]), g["lr"], g["max_norm"], g.get("clip_value")) for g in opt.param_groups
    ]
    assert found == [(2, 0.1, 2.0, None), (2, 0.1, 5.0, 1.0)]


def test_records_name_parameters_and_a_schedule_may_know_the_inner_optimizer_alone() -> None:
    model = Sdf()
    config = GuardConfig()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(inner, gamma=0.5)
    opt = config.wrap(model, inner)
    lr = config.lr(opt, schedule)
    model.decoder.bias.grad = torch.tensor([math.nan])
    opt.step()
    lr.step()
    assert lr.get_last_lr() == [1.0]
    assert opt.records()[0].culprits[0][0] == "decoder.bias"


def test_a_store_is_opened_for_the_group_that_is_given(tmp_path: Path) -> None:
    config = GuardConfig.from_dict({"checkpoints": {"directory": str(tmp_path)}})
    with pytest.raises(TypeError, match="group='all'"):
        config.open_store(group="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"gaurd": {}}, ValueError, "unknown setting gaurd; did you mean 'guard'"),
        ({"guard": {"max_nrom": 1}}, ValueError, "guard.max_nrom; did you mean 'max_norm'"),
        ({"guard": {"max_norm": "1"}}, TypeError, "guard.max_norm='1' is of type str"),
        ({"guard": {"max_norm": True}}, TypeError, "guard.max_norm=True is of type bool"),
        ({"guard": {"max_consecutive_skips": 1.5}}, TypeError, "1.5 is of type float"),
        ({"guard": {"max_consecutive_skips": True}}, TypeError, "True is of type bool"),
        ({"guard": {"norm_type": None}}, TypeError, "guard.norm_type=None is of type NoneType"),
        ({"zzz": {}}, ValueError, "unknown setting zzz; valid are guard, spike, groups"),
        ({"guard": {"nonfinite": "ignore"}}, ValueError, "guard.nonfinite='ignore' must be one of"),
        ({"guard": 3}, TypeError, "guard must hold settings, not 3"),
        ({"spike": {"loss": {"sigma": -1}}}, ValueError, "spike.loss: SpikeRule sigma=-1"),
        (
            {"spike": {"loss": {"max": 1, "sigma": 2}}},
            ValueError,
            "spike.loss has max, a setting of Threshold, and sigma of SpikeRule; remove",
        ),
        ({"spike": {"loss": {"max": 1, "sgima": 2}}}, ValueError, "setting spike.loss.sgima"),
        ({"spike": []}, TypeError, "spike must hold settings by name"),
        ({"schedule": {"warmup": {"lr": 0.1}}}, ValueError, "schedule.warmup.steps is missing"),
        ({"schedule": {"floor": None}}, TypeError, "schedule.floor=None is of type NoneType"),
        ({"schedule": {"floor": ["a"]}}, TypeError, r"schedule.floor\[0\]='a'"),
        ({"checkpoints": {}}, ValueError, "checkpoints.directory is missing"),
        ({"checkpoints": {"directory": "x", "keeep": 1}}, ValueError, "did you mean 'keep'"),
        ({"checkpoints": {"directory": "x", "mode": "best"}}, ValueError, "must be one of 'min'"),
        ({"checkpoints": {"directory": "x", "ignore": "*"}}, TypeError, "checkpoints.ignore='*'"),
        ({"batch": {"low": "0"}}, TypeError, "batch.low='0' is of type str"),
        ({"batch": {"high": {"inputs": "1"}}}, TypeError, "batch.high.inputs='1' is of type str"),
        ({"batch": {"high": [1.0]}}, TypeError, r"batch.high=\[1.0\] is of type list"),
        ({"batch": {"low": 1, "high": 0}}, ValueError, r"batch: low=1.0 is above high=0.0"),
        (
            {"batch": {"low": {"x": 1}, "high": {"x": 0}}},
            ValueError,
            r"batch: .*'x'\]=1.0 is above",
        ),
        ({"batch": {"high": math.nan}}, ValueError, "batch: high=nan is NaN"),
        ({"guard": {"max_norm": -1.0}}, ValueError, "guard: max_norm=-1.0 must be >= 0"),
        ({"guard": {"norm_type": 0}}, ValueError, "guard: norm_type=0.0 is not a norm"),
        ({"guard": {"max_consecutive_skips": 0}}, ValueError, "guard: max_consecutive_skips=0"),
        ({"groups": {"a": {"max_norm": -1.0}}}, ValueError, "groups.a: max_norm=-1.0 must be"),
        ({"groups": {"a": {"clip_value": math.nan}}}, ValueError, "groups.a: clip_value=nan"),
        ([], TypeError, "the configuration must hold settings"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_setting_is_named(settings, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GuardConfig.from_dict(settings)


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing() -> None:
    model = Sdf()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    groups = optimizer.param_groups
    with pytest.raises(ValueError, match=r"groups.latent.weight.*did you mean 'latents.weight'"):
        GuardConfig.from_dict({"groups": {"latent.weight": {}}}).wrap(model, optimizer)
    own_norm = {"groups": {"latents*": {"max_norm": 1.0}}}
    with pytest.raises(ValueError, match="clip_scope"):
        GuardConfig.from_dict(own_norm).wrap(model, optimizer)
    with pytest.raises(TypeError, match="group='all'"):
        GuardConfig().wrap(model, optimizer, group="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is a SGD.*pass config\.wrap\(model, optimizer\)"):
        GuardConfig().wrap(optimizer, model)  # type: ignore[arg-type]
    assert optimizer.param_groups is groups and len(groups) == 1


def test_a_pattern_that_matches_no_tensor_of_a_batch_is_an_error() -> None:
    config = GuardConfig.from_dict({"batch": {"low": {"input": 0.0}}})
    with pytest.raises(ValueError, match=r"low\['input'\].*did you mean 'inputs'"):
        config.check((torch.rand(2), torch.rand(2)))


def test_a_configuration_can_be_rebuilt_from_its_values() -> None:
    config = GuardConfig.from_dict({"rollback": {}, "schedule": {"warmup": {"steps": 3}}})
    assert config.rollback is not None and config.batch is None
    assert GuardConfig.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"rule": "ZClip", "z": 3, "max_norm": None}, fastguard.ZClip(z=3.0, max_norm=None)),
        ({"rule": "AutoClip", "window": 50}, fastguard.AutoClip(window=50)),
        ({"rule": "AdaGC"}, fastguard.AdaGC()),
    ],
)
def test_the_limit_may_be_a_rule(settings, rule):
    config = GuardConfig.from_dict({"guard": {"max_norm": settings, "clip_scope": "tensor"}})
    model = torch.nn.Linear(2, 1)
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert opt.max_norm == rule


def test_the_limit_may_apply_to_units():
    settings = {"max_norm": {"rule": "AGC", "exclude": ["head"]}, "clip_scope": "unit"}
    config = GuardConfig.from_dict({"guard": settings})
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 1), "head": torch.nn.Linear(1, 1)})
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert opt.max_norm == fastguard.AGC(exclude=("head",))
    with pytest.raises(ValueError, match="clip_scope='global'; pass clip_scope='unit'"):
        GuardConfig.from_dict({"guard": {"max_norm": {"rule": "AGC"}}})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"z": 3.0}, "guard.max_norm.rule=None must be one of ZClip, AutoClip, AdaGC"),
        ({"rule": "Zclip"}, "guard.max_norm.rule='Zclip' must be one of"),
        ({"rule": "ZClip", "alhpa": 0.9}, "unknown setting guard.max_norm.alhpa; did you mean"),
        ({"rule": "ZClip", "initial": [1.0]}, "unknown setting guard.max_norm.initial"),
        ({"rule": "ZClip", "z": -1.0}, "guard.max_norm: ZClip z=-1.0 must be"),
    ],
)
def test_an_invalid_rule_is_an_error(settings, text):
    with pytest.raises(ValueError, match="max_norm") as caught:
        GuardConfig.from_dict({"guard": {"max_norm": settings}})
    assert text in str(caught.value)


def test_the_header_of_the_records_is_configured(tmp_path):
    path = tmp_path / "records.jsonl"
    settings = {"jsonl": str(path), "name": "gpt-small", "host": False}
    model = torch.nn.Linear(2, 1)
    config = GuardConfig.from_dict({"records": settings})
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    header = json.loads(path.read_text().splitlines()[0])
    assert (header["name"], header["host"]) == ("gpt-small", None)
