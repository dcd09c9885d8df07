"""`ActivationGuard` counts or cleans the outputs of modules."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastguard
from fastguard.diagnosis.activations import ActivationCounts, ActivationGuard, unguarded

NAN, INF = math.nan, math.inf


class Give(nn.Module):
    """Returns its input plus fixed values, in a container."""

    def __init__(self, values, pack=lambda x: x):
        super().__init__()
        self.register_buffer("values", torch.tensor(values), persistent=False)
        self.pack = pack

    def forward(self, x):
        return self.pack(x + self.values)


def model(*values: float) -> nn.Sequential:
    return nn.Sequential(OrderedDict(bad=Give(values), good=nn.ReLU()))


BAD = (NAN, INF, -INF, 5.0, -50.0, 1.0)


def test_count_mode_counts_by_module_and_changes_nothing():
    net, x = model(*BAD), torch.zeros(2, 6)
    plain = net(x)
    with ActivationGuard(net, limit=10.0) as guard:
        assert torch.equal(net(x).nan_to_num(7.0), plain.nan_to_num(7.0))
        net(x)
    assert guard.counts() == {
        "bad": ActivationCounts(nan=4, inf=8, over_limit=4),
        "good": ActivationCounts(nan=4, inf=4, over_limit=0),
    }
    assert str(guard).splitlines()[0] == "bad: 4 NaN, 8 Inf, 4 over 10"


def test_clean_mode_replaces_and_clamps():
    with ActivationGuard(model(*BAD), mode="clean", limit=10.0, modules="bad") as guard:
        assert list(guard.counts()) == ["bad"]
    net = model(*BAD)
    ActivationGuard(net, mode="clean", limit=10.0)
    assert net.bad(torch.zeros(6)).tolist() == [0.0, 0.0, 0.0, 5.0, -10.0, 1.0]
    ActivationGuard(net2 := model(*BAD), mode="clean")
    assert net2.bad(torch.zeros(6)).tolist() == [0.0, 0.0, 0.0, 5.0, -50.0, 1.0]


def test_the_gradient_of_a_replaced_element_is_zero_even_if_the_incoming_gradient_is_nan():
    net = model(*BAD)
    ActivationGuard(net, mode="clean", limit=10.0)
    x = torch.zeros(6, requires_grad=True)
    net.bad(x).backward(torch.tensor([NAN, INF, NAN, 2.0, NAN, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist()[:4] == [0.0, 0.0, 0.0, 2.0]
    assert x.grad[5] == 3.0


def test_clean_mode_leaves_a_finite_step_bitwise_unchanged():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4)
    net(x).sum().backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with ActivationGuard(net, mode="clean", limit=1e4) as guard:
        net(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), plain, strict=True))
    assert not any(map(any, guard.counts().values()))
    assert str(guard) == "no bad values in the outputs of 3 modules"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_keep_their_dtype(dtype):
    net = model(*BAD).to(dtype)
    guard = ActivationGuard(net, mode="clean", limit=10.0)
    out = net(torch.zeros(6, dtype=dtype))
    assert out.dtype is dtype
    assert guard.counts()["bad"] == (1, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_8_bit_floats_are_counted_and_cleaned(dtype):
    class Low(nn.Module):
        def forward(self, x):
            return x.to(dtype)

    x = torch.tensor([NAN, 1.5, -3.0, 64.0, -0.0])
    with ActivationGuard(net := Low(), limit=10.0) as guard:
        plain = net(x)
    assert guard.counts() == {"": (1, 0, 1)}
    with ActivationGuard(net, mode="clean", limit=10.0) as guard:
        out = net(x)
    assert out.dtype is dtype and guard.counts() == {"": (1, 0, 1)}
    assert out.float().tolist() == [0.0, 1.5, -3.0, 10.0, 0.0]
    assert torch.equal(out.view(torch.uint8)[[1, 2, 4]], plain.view(torch.uint8)[[1, 2, 4]])
    with ActivationGuard(net, mode="clean") as guard:
        assert net(x).float().tolist()[3] == 64.0
    if dtype is torch.float8_e5m2:  # float8_e4m3fn has no infinities
        with ActivationGuard(net) as guard:
            net(torch.tensor([INF, -INF, 1.0]))
        assert guard.counts()[""].inf == 2


def test_packed_4_bit_floats_are_ignored():
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with ActivationGuard(nn.Identity(), mode="clean") as guard:
        assert guard._see(0, packed) is None


@pytest.mark.parametrize(
    "pack, unpack",
    [
        (lambda x: (x, 3), lambda out: out[0]),
        (lambda x: {"logits": x, "note": "text"}, lambda out: out["logits"]),
        (lambda x: [None, (x, torch.arange(3))], lambda out: out[1][0]),
    ],
    ids=["tuple", "dict", "nested"],
)
def test_outputs_in_containers_are_cleaned(pack, unpack):
    net = Give([NAN, 1.0], pack)
    guard = ActivationGuard(net, mode="clean")
    assert unpack(net(torch.zeros(2))).tolist() == [0.0, 1.0]
    assert guard.counts() == {"": (1, 0, 0)}


def test_lstm_outputs_and_empty_outputs_are_supported():
    net = nn.LSTM(2, 3)
    guard = ActivationGuard(net, mode="clean")
    out, (h, _) = net(torch.full((4, 1, 2), NAN))
    assert not out.any() and not h.any()
    assert guard.counts()[""].nan == 4 * 3 + 2 * 3
    ActivationGuard(nn.Identity())._see(0, torch.empty(0))


@pytest.mark.parametrize(
    "patterns, names",
    [
        ("*", ["", "enc", "enc.0", "enc.1", "dec"]),
        ("enc*", ["enc", "enc.0", "enc.1"]),
        (["dec", "*.1"], ["enc.1", "dec"]),
        ("", [""]),
    ],
)
def test_modules_are_selected_by_pattern(patterns, names):
    class Enc(nn.Sequential):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = Enc(nn.Linear(2, 2), nn.ReLU())
            self.dec = nn.Linear(2, 2)

    assert list(ActivationGuard(Net(), modules=patterns).counts()) == names


def test_reset_and_remove():
    net = model(NAN)
    guard = ActivationGuard(net)
    net(torch.zeros(1))
    guard.reset()
    assert guard.counts()["bad"] == (0, 0, 0)
    net(torch.zeros(1))
    guard.remove()
    guard.remove()
    net(torch.zeros(1))
    assert guard.counts()["bad"] == (1, 0, 0)
    assert not any(m._forward_hooks for m in net.modules())


def test_the_state_dict_is_unchanged_and_memory_does_not_grow():
    net = model(NAN)
    keys = list(net.state_dict())
    guard = ActivationGuard(net)
    table = guard._table
    for _ in range(100):
        net(torch.zeros(1))
    assert list(net.state_dict()) == keys
    assert guard._table is table
    assert guard.counts()["bad"].nan == 100


def test_unguarded_disables_the_guard():
    net = model(NAN)
    guard = ActivationGuard(net, mode="clean")
    with unguarded():
        assert net(torch.zeros(1)).isnan().all()
    assert guard.counts()["bad"].nan == 0
    assert net(torch.zeros(1)) == 0


@pytest.mark.parametrize(
    "mode, backend",
    [("count", "aot_eager"), ("clean", "aot_eager"), ("clean", "inductor")],
    ids=["count-aot", "clean-aot", "clean-inductor"],
)
def test_a_compiled_model_is_one_graph_and_counts_the_same(mode, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    eager, net = model(*BAD), model(*BAD)
    ours, theirs = (ActivationGuard(n, mode=mode, limit=4.5) for n in (net, eager))
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for _ in range(3):
        out, expected = compiled(x), eager(x)
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    out.sum().backward()
    got = x.grad.clone()
    x.grad = None
    expected.sum().backward()
    torch.testing.assert_close(got, x.grad, equal_nan=True, rtol=0, atol=0)
    assert ours.counts() == theirs.counts()
    assert ours.counts()["bad"].nan == 3
    stats = torch._dynamo.utils.counters["frames"]
    assert stats["total"] == stats["ok"]


def test_compiled_code_notices_a_removed_guard():
    torch._dynamo.reset()
    net, x = Give(BAD), torch.zeros(6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with ActivationGuard(net, mode="clean") as guard:
        assert compiled(x).isfinite().all()
        with unguarded():
            assert compiled(x).isnan().any()
    assert compiled(x).isnan().any()
    assert guard.counts()[""].nan == 1


def test_compiled_code_notices_a_late_guard_after_a_dynamo_reset():
    torch._dynamo.reset()
    net, x = Give(BAD), torch.zeros(6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert compiled(x).isnan().any()
    guard = ActivationGuard(net, mode="clean")
    torch._dynamo.reset()
    assert compiled(x).isfinite().all()
    assert guard.counts()[""].nan == 1


def test_incident_d_trains_with_finite_activations_under_a_cleaning_guard():
    """With log(0) in the decoder, weights become NaN in plain torch but not with the guard."""

    class LogHead(nn.Module):
        def forward(self, x):
            return x.relu().log()

    def weights(guarded: bool) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), LogHead(), nn.Linear(16, 1))
        guard = ActivationGuard(net, mode="clean", limit=10.0) if guarded else None
        opt = torch.optim.SGD(net.parameters(), lr=0.01)
        if guarded:
            opt = fastguard.GuardedOptimizer(opt, max_norm=1.0, nonfinite="zero")
        for _ in range(20):
            x = torch.randn(32, 4)
            loss = (net(x) - x[:, :1]).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert guard is None or (guard.counts()["1"].inf and loss.isfinite())
        return net

    assert not all(p.isfinite().all() for p in weights(guarded=False).parameters())
    assert all(p.isfinite().all() for p in weights(guarded=True).parameters())


@pytest.mark.parametrize(
    "kwargs, error, says",
    [
        ({"mode": "clear"}, ValueError, "use one of count, clean"),
        ({"limit": 0.0}, ValueError, "limit=0.0"),
        ({"limit": NAN}, ValueError, "limit=nan"),
        ({"limit": "10"}, TypeError, "limit='10'"),
        ({"modules": "decoder.*"}, ValueError, "the modules are: bad, good"),
    ],
)
def test_wrong_arguments(kwargs, error, says):
    with pytest.raises(error, match=says):
        ActivationGuard(model(1.0), **kwargs)


def test_a_model_that_is_not_a_module_raises_type_error():
    with pytest.raises(TypeError, match="not a torch"):
        ActivationGuard(torch.relu)


@pytest.mark.parametrize("mode", ["count", "clean"])
def test_a_model_on_the_meta_device_is_counted_after_it_gets_memory(mode):
    module = nn.Linear(2, 1, device="meta")
    guard = ActivationGuard(module, mode=mode)
    assert str(guard) == "no bad values in the outputs of 1 modules"
    assert module(torch.ones(1, 2, device="meta")).is_meta
    for look in (guard.counts, guard.__str__):
        with pytest.raises(ValueError, match=r"on the meta device.*allocate .*to_empty"):
            look()
    module.to_empty(device="cpu")
    nn.init.constant_(module.weight, math.nan)
    nn.init.zeros_(module.bias)
    module(torch.ones(1, 2))
    assert guard.counts()[""].nan == 1
    module.to("meta")(torch.ones(1, 2, device="meta"))
    guard.reset()
    assert guard.counts()[""].nan == 0
