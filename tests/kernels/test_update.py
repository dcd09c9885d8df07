"""The update kernel in the interpreter gives the bits of `fastguard.optim.reference`."""

import itertools
import math

import pytest
import torch

from fastguard.kernels import columns, formulas, update_launch, update_table
from fastguard.optim import backend as optim_backend
from fastguard.optim import bits, contract, cpu, reference
from fastguard.optim import triton as triton_optim
from fastguard.optim.contract import STATES, Update
from fastguard.optim.options import SPIKE_GRACE

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Every second tensor is unaligned; 4500 elements are two chunks.
SHAPES = [(7,), (13, 37), (4500,), (1,), (0,), (29, 11)]
GROUPS = [0, 1, 0, 1, 0, 1]
SEGMENTS = [0, 1, 2, 1, 0, 2]
# lr, beta1, beta2, eps, weight_decay, momentum, dampening, sign, seed; threshold, reset, warm-up
HYPER = [
    [1e-3, 0.9, 0.999, 1e-8, 1e-2, 0.9, 0.1, 1.0, 3_000_000_000, 0.5, 9, 4],
    [3e-2, 0.8, 0.95, 1e-6, 0.0, 0.5, 0.0, -1.0, 11, 3.0, 0, 0],
]
MULTIPLIERS = [0.37, 1.0, 2.0**-16]


def placed(x, odd):
    """Returns a tensor, or a copy of it that is not 16-byte aligned."""
    if not odd:
        return x
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    return flat[1:].view(x.shape).copy_(x)


def made(
    algorithm="adamw", dtypes=(F32, F32, F32), odd=False, amsgrad=False, master=None,
    rounding="nearest", n_steps=3, multiplier=MULTIPLIERS, found_inf=0.0, clean=0.0, seed=0,
    shapes=SHAPES, **options,
):  # fmt: skip
    """Returns an update of (weight, gradient, state) dtypes; every second tensor is unaligned."""
    torch.manual_seed(seed)
    weight, gradient, state = dtypes
    each = [odd and i % 2 == 1 for i in range(len(shapes))]
    exact = [torch.randn(s, dtype=F64 if weight is F64 else F32) for s in shapes]
    masters = []
    if master == "float32":
        masters = [placed(x.clone(), o) for x, o in zip(exact, each, strict=True)]
    elif master == "remainder":
        parts = [bits.split(x) for x in exact]
        masters = [placed(low, o) for (_, low), o in zip(parts, each, strict=True)]
        exact = [high for high, _ in parts]
    names = [n for n in STATES[algorithm] if amsgrad or n != "max_exp_avg_sq"]
    if options.pop("stateless", False):
        names = []
    n = len(shapes)
    return Update(
        algorithm=algorithm,
        parameters=[placed(x.to(weight), o) for x, o in zip(exact, each, strict=True)],
        grads=[placed(torch.randn(s).to(gradient), o) for s, o in zip(shapes, each, strict=True)],
        states={
            name: [
                placed((torch.rand(s) * 1e-2).to(state), o)
                for s, o in zip(shapes, each, strict=True)
            ]
            for name in names
        },
        steps=[torch.tensor(float(n_steps * i)) for i in range(n)],
        hyper=torch.tensor(HYPER, dtype=F64),
        group_ids=(GROUPS * n)[:n],
        multiplier=torch.tensor(multiplier, dtype=F64),
        segment_ids=(SEGMENTS * n)[:n],
        found_inf=torch.tensor(found_inf),
        clean=torch.tensor(clean),
        master=master,
        masters=masters,
        rounding=rounding,
        counters=[(2**32 - 4000 + 1000 * i) % 2**32 for i in range(n)]
        if rounding == "stochastic"
        else [],
        amsgrad=amsgrad,
        **options,
    )


def written(one):
    lists = [one.parameters, *one.states.values(), one.masters, one.steps]
    return [tensor for tensors in lists for tensor in tensors]


def as_bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        if a.dtype is F64:  # exp2 of the bias corrections differs between NumPy and PyTorch
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
            continue
        if torch.equal(as_bits(a), as_bits(b)):
            continue
        both_nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a).bool()
        assert torch.equal(as_bits(a)[~both_nan], as_bits(b)[~both_nan])


def check(n_updates=2, grads=None, **options):
    """Checks that kernel and reference take equal steps and do not write gradients."""
    ours, theirs = made(**options), made(**options)
    for one in range(n_updates):
        for i, (a, b) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
            torch.manual_seed(100 * one + i)
            b.copy_(torch.randn(b.shape))
            if grads is not None:
                grads(b)
            a.copy_(b)
        triton_optim.update(ours)
        reference.update(theirs)
        assert_same_bits(written(ours), written(theirs))
        assert_same_bits(ours.grads, theirs.grads)
    return ours


MIXES = {
    "fp32": (F32, F32, F32),
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "fp64": (F64, F64, F64),
    "bf16-grads": (F32, BF16, F32),
    "fp32-state": (BF16, BF16, F32),
    "bf16-state": (F32, F32, BF16),
}
ALGORITHMS = {
    "adamw": {},
    "adamw-amsgrad": {"algorithm": "adamw", "amsgrad": True},
    "adam": {"algorithm": "adam"},
    "adam-amsgrad": {"algorithm": "adam", "amsgrad": True},
    "sgd": {"algorithm": "sgd"},
    "sgd-nesterov": {"algorithm": "sgd", "nesterov": True},
    "sgd-plain": {"algorithm": "sgd", "stateless": True},
    "lion": {"algorithm": "lion"},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("dtypes", MIXES.values(), ids=MIXES)
def test_each_algorithm_with_each_mix_of_dtypes(algorithm, dtypes):
    """Several groups and segments, with aligned and unaligned tensors."""
    check(**algorithm, dtypes=dtypes, odd=True)


SPIKES = {
    "spikes": {"spike_aware": True},
    "clipped": {"update_clipping": True},
    "both": {"spike_aware": True, "update_clipping": True},
}


@pytest.mark.parametrize("dtypes", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adamw", "amsgrad"])
@pytest.mark.parametrize("options", SPIKES.values(), ids=SPIKES)
def test_spikes_resets_and_update_clipping(options, amsgrad, dtypes):
    """Tensors have taken 0 to 45 steps, so that some reset, some warm up and some clip spikes."""
    options = options | {"dtypes": dtypes, "amsgrad": amsgrad, "n_steps": 9}
    ours = check(**options, odd=True, reproducible=True)
    plain = made(**options | {"spike_aware": False, "update_clipping": False}, odd=True)
    for _ in range(2):
        triton_optim.update(plain)
    assert not all(map(torch.equal, ours.parameters, plain.parameters))


@pytest.mark.parametrize("master", ["float32", "remainder"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_spikes_with_a_master(master, rounding):
    check(**SPIKES["both"], dtypes=(BF16, BF16, BF16), master=master, rounding=rounding, n_steps=9)


@pytest.mark.parametrize("clean", [0.0, 1.0], ids=["keep", "clean"])
def test_update_clipping_leaves_out_nonfinite_elements(clean):
    ours = check(**SPIKES["clipped"], grads=bad_ends, clean=clean, n_steps=9)
    finite = [p.isfinite().sum().item() for p in ours.parameters if p.numel() > 2]
    sizes = [p.numel() for p in ours.parameters if p.numel() > 2]
    assert finite == (sizes if clean else [n - 3 for n in sizes])


@pytest.mark.parametrize("found_inf", [1.0, math.nan])
def test_a_skipped_step_neither_resets_nor_clips(found_inf):
    options = {**SPIKES["both"], "found_inf": found_inf, "n_steps": 9}
    assert_same_bits(written(check(**options)), written(made(**options)))


def test_update_clipping_does_not_depend_on_chunks(monkeypatch):
    options = {**SPIKES["both"], "shapes": [(30_000,)], "n_steps": 9}
    first, second = made(**options), made(**options)
    triton_optim.update(first)
    monkeypatch.setattr(update_table, "chunk_size", lambda n, programs: 4096 * 3)
    monkeypatch.setattr(update_table, "_layouts", {})
    monkeypatch.setattr(update_table, "_tables", {})
    triton_optim.update(second)
    assert_same_bits(written(first), written(second))


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
@pytest.mark.parametrize("reproducible", [False, True], ids=["fast", "reproducible"])
@pytest.mark.parametrize("master", ["float32", "remainder"])
@pytest.mark.parametrize("state", [F32, BF16], ids=str)
@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_master_weights_of_bfloat16(algorithm, state, master, reproducible, odd):
    check(
        algorithm=algorithm, dtypes=(BF16, BF16, state), master=master, odd=odd,
        reproducible=reproducible,
    )  # fmt: skip


def test_a_float32_master_of_float16():
    check(dtypes=(F16, F16, F32), master="float32")


def test_a_remainder_is_exactly_the_float32_weight():
    """Both kinds of masters take bitwise equal steps."""
    options = {"dtypes": (BF16, BF16, F32), "algorithm": "adamw"}
    whole, split = check(**options, master="float32"), check(**options, master="remainder")
    for exact, high, low in zip(whole.masters, split.parameters, split.masters, strict=True):
        assert torch.equal(as_bits(bits.from_remainder(high, low)), as_bits(exact))


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("master", [None, "float32", "remainder"], ids=str)
def test_stochastic_rounding(algorithm, master):
    """Weights without a master, and states, are rounded with the noise of the reference."""
    check(**algorithm, dtypes=(BF16, BF16, BF16), rounding="stochastic", master=master, odd=True)


@pytest.mark.parametrize("state", [F16, F32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 4e4], ids=["normal", "subnormal", "largest"])
def test_stochastic_rounding_of_float16(scale, state):
    """Weights overflow at the largest scale and change by subnormal numbers at the smallest."""
    check(
        algorithm="sgd", dtypes=(F16, F16, state), rounding="stochastic", odd=True,
        grads=lambda g: g.mul_(scale), multiplier=[30.0, 1.0, 1e-3],
    )  # fmt: skip
    check(dtypes=(F16, F16, state), rounding="stochastic", grads=lambda g: g.mul_(scale))


def test_noise_does_not_depend_on_chunks(monkeypatch):
    options = {"dtypes": (BF16, BF16, BF16), "rounding": "stochastic", "shapes": [(30_000,)]}
    first = made(**options)
    triton_optim.update(first)
    monkeypatch.setattr(update_table, "chunk_size", lambda n, programs: 4096 * 3)
    monkeypatch.setattr(update_table, "_layouts", {})
    monkeypatch.setattr(update_table, "_tables", {})
    second = made(**options)
    triton_optim.update(second)
    assert_same_bits(written(first), written(second))


def test_stochastic_rounding_is_unbiased():
    """0.999 is a quarter of a step above 0.99609375; the mean is within 4 sigma of 10^6 values."""
    n = 10**6
    one = made(
        algorithm="sgd", stateless=True, dtypes=(BF16, BF16, BF16), rounding="stochastic",
        shapes=[(n,)], multiplier=[1.0],
    )  # fmt: skip
    one.parameters[0].fill_(1.0)
    one.grads[0].fill_(1.0)
    one.hyper[0, [0, 4]] = torch.tensor([1e-3, 0.0], dtype=F64)
    triton_optim.update(one)
    levels = one.parameters[0].double()
    low, high = 0.99609375, 1.0
    assert set(levels.unique().tolist()) == {low, high}
    p = (0.999 - low) / (high - low)
    sigma = (high - low) * math.sqrt(p * (1 - p) / n)
    assert abs(levels.mean().item() - 0.999) <= 4 * sigma + 1e-9  # 0.999 is rounded to float32


@pytest.mark.parametrize("found_inf", [1.0, math.nan, 2.0])
@pytest.mark.parametrize("master", [None, "float32", "remainder"], ids=str)
def test_a_skipped_step_writes_nothing(found_inf, master):
    def spoil(grad):
        grad.fill_(math.nan)

    before = made(dtypes=(BF16, BF16, BF16), master=master, found_inf=found_inf)
    ours = check(
        dtypes=(BF16, BF16, BF16), master=master, found_inf=found_inf, grads=spoil
    )  # fmt: skip
    assert_same_bits(written(ours), written(before))


def bad_ends(grad):
    if grad.numel() > 2:
        flat = grad.view(-1)
        flat[0], flat[-1], flat[flat.numel() // 2] = math.nan, math.inf, -math.inf


@pytest.mark.parametrize("clean", [0.0, 1.0], ids=["keep", "clean"])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["adamw", "adam", "sgd", "lion"])
def test_non_finite_gradients(algorithm, dtypes, clean):
    ours = check(algorithm=algorithm, dtypes=dtypes, clean=clean, grads=bad_ends, amsgrad=False)
    assert all(p.isfinite().all() for p in ours.parameters) == bool(clean)


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_non_finite_weights_with_a_master(master):
    check(dtypes=(BF16, BF16, F32), master=master, grads=bad_ends)


@pytest.mark.parametrize("multiplier", [1.0, 0.0, 3e-43, 1e-30, math.nan, math.inf])
def test_multipliers(multiplier):
    check(multiplier=[multiplier, 0.5, 1.0], grads=lambda g: g.mul_(1e18))


def test_without_steps():
    for algorithm in ("lion", "sgd"):
        ours, theirs = (made(algorithm=algorithm, n_steps=0) for _ in range(2))
        for one, take in ((ours, triton_optim), (theirs, reference)):
            one.hyper[:, 6] = 0.0
            object.__setattr__(one, "steps", [])
            take.update(one)
        assert_same_bits(written(ours), written(theirs))


def test_arrays_with_other_strides():
    """Strides of channels last, transposed and with holes; all but gradients are copied back."""

    def strided(one):
        lists = [one.parameters, one.grads, *one.states.values()]
        n = len(one.parameters)
        for number, tensors in enumerate(lists):
            for i, look in zip(range(n), itertools.cycle(range(3)), strict=False):
                if tensors[i].dim() == 2 and (number + i) % 2:
                    wide = torch.empty(tensors[i].shape[0], 3 * tensors[i].shape[1])
                    views = (tensors[i].t().contiguous().t(), wide[:, ::3], tensors[i])
                    tensors[i] = views[look].copy_(tensors[i].clone())
        return one

    for _ in range(2):
        ours, theirs = strided(made()), strided(made())
        assert not all(map(torch.Tensor.is_contiguous, written(ours)))
        triton_optim.update(ours)
        reference.update(theirs)
        assert_same_bits(written(ours), written(theirs))


def test_other_hyper_parameters_use_the_same_kernel():
    one = made()
    update_launch.variant_of.cache_clear()
    for lr in (1e-3, 2e-3, 5e-4):
        one.hyper[:, 0] = lr
        triton_optim.update(one)
    assert update_launch.variant_of.cache_info().currsize == 1


def test_the_table_is_cached_until_an_address_changes(monkeypatch):
    uploads = []
    upload = update_table.upload

    def counted(numbers, *rest):
        uploads.append(numbers.size)
        return upload(numbers, *rest)

    monkeypatch.setattr(update_table, "upload", counted)
    monkeypatch.setattr(update_table, "_tables", {})
    monkeypatch.setattr(update_table, "_layouts", {})
    one = made()
    triton_optim.update(one)
    assert len(uploads) == 2
    triton_optim.update(one)
    assert len(uploads) == 2
    one.grads[2] = one.grads[2].clone()
    triton_optim.update(one)
    assert uploads[2:] == [8 * len(SHAPES)]  # only addresses are uploaded
    one.segment_ids[0] = 1
    triton_optim.update(one)
    assert len(uploads) == 5


def test_version_counters_are_incremented():
    one = made()
    versions = [t._version for t in written(one)]
    triton_optim.update(one)
    assert all(t._version > v for t, v in zip(written(one), versions, strict=True))


def test_the_columns_match_the_contract():
    assert columns.HYPER_COLUMNS.value == len(contract.HYPER)
    assert columns.COEFFICIENT_COLUMNS.value == contract.N_COEFFICIENTS
    for name in ("SIGN", "KEY", "SPIKE", "RESET", "SUM_SCALE"):
        assert getattr(columns, f"{name}_COLUMN").value == getattr(contract, name)
    assert formulas.SPIKE_GRACE.value == SPIKE_GRACE
    assert list(formulas.ALGORITHMS) == list(contract.COEFFICIENTS)
    assert list(contract.HYPER) == list(formulas.HYPER)


def test_a_device_with_kernels_uses_them(monkeypatch):
    """The stages select the backend, so `FASTGUARD_BACKEND=torch` turns these kernels off too."""
    device = torch.device("cuda", 0)
    for served, take in (("triton", triton_optim.update), ("torch", reference.update)):
        monkeypatch.setattr(optim_backend, "backend_of", lambda device, served=served: served)
        assert optim_backend.updater_for(device) is take
    assert optim_backend.updater_for(torch.device("cpu")) is cpu.update
