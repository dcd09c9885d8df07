"""Wrong use: each error names the value and the remedy, and nothing is changed."""

import inspect
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GuardedOptimizer, SpikeRule
from guardtest.training import assert_same_bits, give_gradients, new_parameters, snapshot


def sgd(parameters=None):
    return torch.optim.SGD(parameters or new_parameters(), lr=0.1)


BAD_ARGUMENTS = {
    "negative max_norm": ({"max_norm": -1.0}, ValueError, r"max_norm=-1.0 must be >= 0.*inf"),
    "nan max_norm": ({"max_norm": math.nan}, ValueError, "max_norm=nan must be >= 0"),
    "word max_norm": ({"max_norm": "big"}, TypeError, "max_norm='big' is not a number"),
    "list max_norm": ({"max_norm": [1.0]}, TypeError, r"max_norm=\[1.0\] is not a number"),
    "zero norm_type": ({"norm_type": 0}, ValueError, "norm_type=0 is not a norm"),
    "nan norm_type": ({"norm_type": math.nan}, ValueError, "norm_type=nan is not a norm"),
    "word norm_type": ({"norm_type": "two"}, TypeError, "norm_type='two' is not a number"),
    "scope": ({"clip_scope": "layer"}, ValueError, "clip_scope='layer'.*global, group, tensor"),
    "mode": ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore'.*skip, zero, raise"),
    "unhashable mode": ({"nonfinite": ["skip"]}, ValueError, r"nonfinite=\['skip'\] is unknown"),
    "spike": (
        {"spike": 6.0},
        TypeError,
        r"spike=6.0 is a number.*SpikeRule\(sigma=6.0\).*Threshold\(max=6.0\)",
    ),
    "word spike": ({"spike": "high"}, TypeError, "spike='high' must be a SpikeRule"),
    "spike on a loss": (
        {"spike": {"ce": SpikeRule(action="clip")}},
        ValueError,
        r"spike\['ce'\].*use action='skip' or 'record'",
    ),
    "budget 0": ({"max_consecutive_skips": 0}, ValueError, "max_consecutive_skips=0"),
    "budget word": ({"max_consecutive_skips": "3"}, ValueError, "max_consecutive_skips='3'"),
    "budget bool": ({"max_consecutive_skips": True}, ValueError, "max_consecutive_skips=True"),
    "budget float": ({"max_consecutive_skips": 3.0}, ValueError, "max_consecutive_skips=3.0"),
    "group": ({"group": "world"}, TypeError, "group=.world. is not a process group; pass"),
    "names": (
        {"named_parameters": [torch.zeros(2)]},
        TypeError,
        r"yields a Tensor.*pass model.named_parameters\(\)",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument(case):
    options, error, message = BAD_ARGUMENTS[case]
    parameters = new_parameters()
    inner = sgd(parameters)
    with pytest.raises(error, match=message):
        GuardedOptimizer(inner, flat_buckets=True, **options)
    assert all(p.grad is None for p in parameters)


def test_a_positional_max_norm():
    parameters = new_parameters()
    with pytest.raises(TypeError, match=r"got 1.0 as second.*\(optimizer, max_norm=1.0\)"):
        GuardedOptimizer(sgd(parameters), 1.0)
    with pytest.raises(TypeError, match=r"got SpikeRule.*takes only keyword"):
        GuardedOptimizer(sgd(parameters), SpikeRule(), 2.0)
    assert list(inspect.signature(GuardedOptimizer).parameters)[:2] == ["optimizer", "max_norm"]


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match=r"no argument 'max_nrom'; did you mean 'max_norm'"):
        GuardedOptimizer(sgd(new_parameters()), max_nrom=1.0)
    with pytest.raises(TypeError, match=r"no argument 'xyz'; valid are optimizer, max_norm"):
        GuardedOptimizer(sgd(new_parameters()), xyz=1.0)


def test_names_of_other_parameters():
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    exhausted = model.named_parameters()
    list(exhausted)
    for named in (other.named_parameters(), exhausted, [], {}.items()):
        with pytest.raises(ValueError, match=r"named_parameters contains none of .* 2 parameters"):
            GuardedOptimizer(sgd(list(model.parameters())), named_parameters=named)
    with pytest.raises(
        ValueError,
        match=r"named_parameters is empty.*exhausted generator.*named_parameters\(\) of the model",
    ):
        GuardedOptimizer(sgd(list(model.parameters())), named_parameters=exhausted)
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(TypeError, match=r"is a \w+; pass model.named_parameters\(\)"):
            GuardedOptimizer(sgd(list(model.parameters())), named_parameters=whole)
    opt = GuardedOptimizer(
        sgd(list(model.parameters())), named_parameters=[("w", model.weight), ("o", other.weight)]
    )
    opt.optimizer.param_groups[0]["params"][1].grad = torch.tensor([math.nan])
    opt.step()
    assert opt.records()[0].culprits == (("parameter 1", 1, 0, 0),)


def test_a_loss_instead_of_a_closure():
    for inner in (sgd(), torch.optim.LBFGS(new_parameters())):
        opt = GuardedOptimizer(inner)
        for loss in (torch.tensor(1.0), 1.0, {"loss": 1.0}):
            with pytest.raises(TypeError, match=r"closure is a .*pass opt\.step\(loss=loss\)"):
                opt.step(loss)
        assert opt.steps_taken == 0


@pytest.mark.parametrize("inner", [None, nn.Linear(1, 1), [nn.Parameter(torch.zeros(1))]])
def test_a_non_optimizer(inner):
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer.*AdamW"):
        GuardedOptimizer(inner)


def test_an_optimizer_that_is_guarded_already():
    with pytest.raises(TypeError, match=r"already guarded; pass its `\.optimizer`"):
        GuardedOptimizer(GuardedOptimizer(sgd()))


def test_sparse_adam():
    inner = torch.optim.SparseAdam(nn.Embedding(3, 2, sparse=True).parameters())
    with pytest.raises(TypeError, match=r"SparseAdam takes sparse gradients.*use Adam"):
        GuardedOptimizer(inner)


def test_an_optimizer_without_parameters():
    with pytest.raises(ValueError, match="the optimizer has no parameters to guard"):
        GuardedOptimizer(torch.optim.SGD([{"params": []}], lr=0.1))


def test_differentiable_optimizers():
    inner = torch.optim.SGD(new_parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="differentiable=True"):
        GuardedOptimizer(inner)


def test_limits_of_param_groups():
    (p,) = new_parameters([(2,)])
    for group, scope, message in (
        ({"max_norm": 1.0}, "global", "use clip_scope='group'"),
        ({"max_norm": -1.0}, "group", "max_norm=-1.0 must be >= 0"),
        ({"clip_value": math.nan}, "global", "clip_value=nan must be >= 0"),
    ):
        inner = torch.optim.SGD([{"params": [p], **group}], lr=0.1)
        with pytest.raises(ValueError, match=message):
            GuardedOptimizer(inner, clip_scope=scope)
    inner = torch.optim.SGD([{"params": [p], "clip_value": "big"}], lr=0.1)
    with pytest.raises(TypeError, match="clip_value='big' is not a number"):
        GuardedOptimizer(inner)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.ones(3), ValueError, r"loss has shape \(3,\).*\.mean\(\)"),
        ({"ce": torch.ones(2, 1)}, ValueError, r"ce has shape \(2, 1\)"),
        ("low", TypeError, "loss='low' is a str"),
    ],
)
@pytest.mark.parametrize("through", ["step", "observe", "closure"])
def test_a_bad_loss(loss, error, message, through):
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.AdamW(parameters, fused=True), max_norm=0.1)
    give_gradients(parameters, 0)
    before, grads = snapshot(opt), [p.grad.clone() for p in parameters]
    with pytest.raises(error, match=message):
        if through == "closure":
            opt.step(lambda: loss)
        elif through == "step":
            opt.step(loss=loss)
        else:
            opt.observe(loss)
    assert_same_bits(snapshot(opt), before)
    assert all(map(torch.equal, [p.grad for p in parameters], grads))
    opt.step(loss=1.0)
    assert opt.records()[0].losses == {"loss": 1.0}


def test_an_unsupported_norm_of_complex_gradients():
    p = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.1), norm_type=1.0, max_norm=0.1)
    with pytest.raises(TypeError, match=r"complex.*norm_type=2.0"):
        opt.step()
    assert not p.any()
    assert opt.applied_steps == 0


def test_all_errors_are_public():
    assert issubclass(fastguard.NonFiniteGradError, RuntimeError)
    assert issubclass(fastguard.TrainingDivergedError, RuntimeError)
