"""Gradients in flat buffers: the same results, whatever happens to a `.grad` behind their back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastguard import FlatGradBuckets, GuardedOptimizer, NonFiniteGradError, clip_grad_norm_
from guardtest.training import assert_same_bits, new_parameters, snapshot

NAN = float("nan")


def model_of(channels_last=False):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.Linear(5, 1)
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(2, 3, 6, 6, generator=generator)).square().mean().backward()


def attached(flat):
    """Whether every gradient lies in its slot."""
    spans = [(b.flat.data_ptr(), b.flat.data_ptr() + b.flat.nbytes) for b in flat._buffers]
    return all(
        p.grad is not None and any(a <= p.grad.data_ptr() < z for a, z in spans)
        for p in flat.parameters
        if p.numel()
    )


def gaps(flat):
    return [b.flat[b.gaps] for b in flat._buffers if b.gaps is not None]


# The buckets themselves.


def test_gradients_live_in_one_buffer_and_zeroing_is_one_fill():
    model = model_of()
    flat = FlatGradBuckets(model.parameters())
    backward(model, 0)
    assert attached(flat)
    assert len(flat._buffers) == 1
    flat.zero_()
    assert not any(p.grad.any() for p in model.parameters())
    for p in model.parameters():
        assert p.grad.data_ptr() % 16 == flat._buffers[0].flat.data_ptr() % 16


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
def test_clipping_equals_the_plain_function_bit_for_bit(trusted, channels_last):
    for max_norm in (1e9, 1e-3):
        a, b = model_of(channels_last), model_of(channels_last)
        flat = FlatGradBuckets(a.parameters(), trusted=trusted)
        for step in range(2):
            flat.zero_()
            b.zero_grad()
            backward(a, step)
            backward(b, step)
            norm = flat.clip_grad_norm_(max_norm)
            expected = clip_grad_norm_(b.parameters(), max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0.0)
                if max_norm == 1e9:
                    assert torch.equal(p.grad, q.grad)


def test_slots_have_the_strides_of_their_parameters():
    """Fused optimizers walk parameter, gradient and state together."""
    model = model_of(channels_last=True)
    FlatGradBuckets(model.parameters())
    for p in model.parameters():
        assert p.grad.stride() == p.stride()
    holes = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    FlatGradBuckets([holes])
    assert holes.grad.is_contiguous()


def test_measure_names_the_culprit():
    model = model_of()
    flat = FlatGradBuckets(model.named_parameters())
    backward(model, 0)
    model[3].weight.grad[0, 0] = NAN
    assert flat.measure().culprits() == [("3.weight", 1, 0, 0)]
    with pytest.raises(NonFiniteGradError, match=r"3.weight \(1 NaN\)"):
        flat.clip_grad_norm_(1.0, error_if_nonfinite=True)
    flat.clip_grad_norm_(1.0, nonfinite="zero")
    assert flat.measure().culprits() == []


def test_dtypes_have_buffers_of_their_own_and_one_norm():
    parameters = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    flat = FlatGradBuckets(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    assert len(flat._buffers) == 3
    assert flat.measure().total_norm.item() == pytest.approx(32**0.5)
    flat.clip_grad_norm_(1.0)
    assert flat.measure().total_norm.item() == pytest.approx(1.0, rel=1e-2)


def test_gradients_that_exist_are_taken_over():
    (p,) = new_parameters([(3,)])
    p.grad = torch.tensor([1.0, 2.0, 2.0])
    flat = FlatGradBuckets([p])
    assert attached(flat)
    assert flat.measure().total_norm == 3.0


def test_autograd_accumulates_into_the_slots():
    a, b = model_of(), model_of()
    flat = FlatGradBuckets(a.parameters())
    for step in range(3):
        backward(a, step)
        backward(b, step)
    assert attached(flat)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_nan_coefficient_on_a_cpu_does_not_reach_the_gaps(monkeypatch):
    parameters = new_parameters([(3,), (5,), (1,)])
    flat = FlatGradBuckets(parameters)
    monkeypatch.setattr(flat, "close_gaps_", lambda: None)
    parameters[0].grad.fill_(NAN)
    flat.clip_grad_norm_(1.0)
    assert all(p.grad.isnan().all() for p in parameters)
    assert not any(g.any() for g in gaps(flat))


def test_gaps_that_a_kernel_filled_are_closed_again():
    flat = FlatGradBuckets(new_parameters([(3,), (5,), (1,)]))
    for buffer in flat._buffers:
        buffer.flat[buffer.gaps] = NAN  # what multiplying whole runs by NaN leaves
    flat.close_gaps_()
    assert flat.measure().total_norm == 0.0
    assert not any(g.any() for g in gaps(flat))


def test_gaps_between_slots_stay_zero():
    """Where a NaN coefficient multiplies long stretches, it must not stay in what lies between."""
    parameters = new_parameters([(3,), (5,), (1,)])
    opt = GuardedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), max_norm=1.0, nonfinite="propagate", flat_buckets=True
    )
    for value in (1.0, NAN, float("inf"), 1.0):
        for p in parameters:
            p.grad.fill_(value)
        opt.step()
        assert not any(g.any() for g in gaps(opt._gradients.flat))
        opt.zero_grad()
    assert sum(len(g) for g in gaps(opt._gradients.flat)) == 1 + 3 + 3
    assert opt.records()[-1].total_norm == 3.0


# Behind their back.


def set_to_none(p, value):
    p.grad = None
    p.grad = value


def view_of_a_buffer(p, value):
    big = torch.zeros(3 * value.numel() + 8, dtype=value.dtype)
    view = big[4 : 4 + value.numel()].view(value.shape)
    view.copy_(value)
    p.grad = view


def alone_in_its_storage(p, value):
    p.grad = value.clone().view(-1).view(value.shape)


def swapped_data(p, value):
    p.grad.data = value.clone()


def written_in_place(p, value):
    p.grad.copy_(value)


def other_strides(p, value):
    p.grad = value.t().contiguous().t() if value.dim() == 2 else value.clone()


def accumulated_after_none(p, value):
    p.grad = None
    (p * value).sum().backward()


def assigned_inside_hook(p, value):
    handle = p.register_hook(lambda g: value)
    p.grad = None
    p.sum().backward()
    handle.remove()


REPLACEMENTS = [
    set_to_none,
    view_of_a_buffer,
    alone_in_its_storage,
    swapped_data,
    written_in_place,
    other_strides,
    accumulated_after_none,
    assigned_inside_hook,
]


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_a_gradient_replaced_behind_the_back_is_the_one_that_counts(replace, max_norm):
    shapes = [(2, 3), (5,), (4,)]
    ours, theirs = new_parameters(shapes), new_parameters(shapes)
    opt = GuardedOptimizer(
        torch.optim.AdamW(ours, lr=0.1, fused=True), max_norm=max_norm, flat_buckets=True
    )
    plain = GuardedOptimizer(torch.optim.AdamW(theirs, lr=0.1, fused=True), max_norm=max_norm)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        opt.zero_grad()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            value = torch.randn(p.shape, generator=generator)
            q.grad = value.clone()
            if (step + i) % 2:
                replace(p, value)
            else:
                written_in_place(p, value)
        opt.step()
        plain.step()
        if replace is not view_of_a_buffer:
            assert attached(opt._gradients.flat)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        if max_norm is None:
            assert torch.equal(p, q)
    mine, reference = opt.records(), plain.records()
    for a, b in zip(mine, reference, strict=True):
        assert a.total_norm == pytest.approx(b.total_norm, rel=1e-7)


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_nan_in_a_replaced_gradient_is_found(replace):
    p, q = new_parameters([(2, 3), (2,)])
    opt = GuardedOptimizer(torch.optim.SGD([p, q], lr=1.0), flat_buckets=True)
    before = snapshot(opt)
    replace(p, torch.full((2, 3), NAN))
    opt.step()
    assert_same_bits(snapshot(opt), before)
    assert opt.records()[0].culprits == (("parameter 0", 6, 0, 0),)
    opt.zero_grad()
    assert not p.grad.any()
    opt.step()
    assert opt.applied_steps == 1


@pytest.mark.parametrize("how", ["model", "optimizer", "by hand"])
def test_none_stays_none_so_that_weight_decay_moves_nothing(how):
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleList([a, b])
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    opt = GuardedOptimizer(inner, flat_buckets=True)
    before = b.weight.detach().clone()
    for step in range(3):
        if how == "model":
            model.zero_grad(set_to_none=True)
        elif how == "optimizer":
            inner.zero_grad(set_to_none=True)
        else:
            for p in model.parameters():
                p.grad = None
        a(torch.ones(1, 2) * step).sum().backward()
        opt.step()
        assert b.weight.grad is None
    assert torch.equal(b.weight, before)
    assert not torch.equal(a.weight, torch.zeros_like(a.weight))
    opt.zero_grad()  # attaches again
    assert attached(opt._gradients.flat)


def test_a_stale_slot_of_a_gradient_that_is_none_does_not_count():
    p, q = new_parameters([(2,), (2,)])
    opt = GuardedOptimizer(torch.optim.SGD([p, q], lr=1.0), flat_buckets=True)
    p.grad.fill_(100.0)
    q.grad.fill_(1.0)
    opt.step()
    p.grad = None
    opt.step()
    assert [r.total_norm for r in opt.records()] == pytest.approx([20002**0.5, 2**0.5])


def test_a_parameter_thawed_later_is_guarded():
    """Left out of the buffers at first; its gradients must not go unseen."""
    head, body = new_parameters([(2,), (3,)])
    body.requires_grad_(False)
    opt = GuardedOptimizer(
        torch.optim.SGD([head, body], lr=1.0),
        max_norm=1.0,
        flat_buckets=True,
        named_parameters=[("head", head), ("body", body)],
    )
    head.grad.fill_(1.0)
    opt.step()
    assert body.grad is None
    body.requires_grad_(True)
    opt.zero_grad()
    (head.sum() + body.sum()).backward()
    opt.step()
    assert attached(opt._gradients.flat)
    (body * NAN).sum().backward()
    opt.step()
    records = opt.records()
    assert records[1].total_norm == pytest.approx(5**0.5)
    assert records[2].culprits == (("body", 3, 0, 0),)


def test_a_parameter_frozen_later_is_left_alone():
    head, body = new_parameters([(2,), (3,)])
    opt = GuardedOptimizer(
        torch.optim.AdamW([head, body], lr=0.1, weight_decay=0.5), flat_buckets=True
    )
    (head.sum() + body.sum()).backward()
    opt.step()
    body.requires_grad_(False)
    before = body.clone()
    for _ in range(2):
        opt.zero_grad()
        head.sum().backward()
        opt.step()
    assert torch.equal(body, before)
    body.requires_grad_(True)
    opt.zero_grad()
    assert attached(opt._gradients.flat)


@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_a_model_that_changes_its_dtype_gets_new_slots(detached):
    model = nn.Linear(3, 2)
    flat = FlatGradBuckets(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    if detached:
        model.zero_grad(set_to_none=True)
    model.to(torch.bfloat16)
    flat.zero_()
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert flat.measure().total_norm.item() == pytest.approx(8**0.5)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert attached(flat)


def test_a_parameter_whose_data_is_swapped_keeps_its_slot():
    (p,) = new_parameters([(3,)])
    flat = FlatGradBuckets([p])
    p.data = torch.ones(3)
    (p * 2).sum().backward()
    assert attached(flat)
    assert flat.measure().total_norm.item() == pytest.approx(12**0.5)


def test_gradients_of_another_dtype_than_the_parameter():
    (p,) = new_parameters([(3,)], torch.bfloat16)
    p.grad_dtype = torch.float32
    flat = FlatGradBuckets([p])
    assert p.grad.dtype == torch.float32
    p.grad = torch.tensor([3.0, 4.0, 1e-3])
    assert flat.measure().total_norm.item() == pytest.approx(5.0000001, rel=1e-7)
    assert attached(flat)


def test_trusted_does_not_look():
    (p,) = new_parameters([(2,)])
    flat = FlatGradBuckets([p], trusted=True)
    slot = p.grad
    p.grad = torch.ones(2)
    assert flat.measure().total_norm == 0.0
    flat.zero_()
    assert p.grad is not slot


def test_two_buckets_over_the_same_parameters_agree():
    parameters = new_parameters([(3,), (4,)])
    first, second = FlatGradBuckets(parameters), FlatGradBuckets(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    assert first.measure().total_norm == second.measure().total_norm
    first.clip_grad_norm_(1.0)
    assert second.measure().total_norm.item() == pytest.approx(1.0)


def test_release_gives_gradients_memory_of_their_own():
    parameters = new_parameters([(3,), (4,)])
    flat = FlatGradBuckets(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    flat.release()
    assert not attached(flat)
    assert all((p.grad == 2.0).all() for p in parameters)


# With a guarded optimizer.


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("dtypes", ["same", "mixed"])
def test_groups_and_scopes_as_without_flat_buckets(scope, dtypes):
    def build(flat):
        parameters = new_parameters([(3, 4), (5,), (2, 3, 2), (), (7,), (1,)])
        if dtypes == "mixed":
            for p in parameters[1::2]:
                p.data = p.data.double()
        groups = [
            {"params": parameters[::2]},  # groups that interleave in the model
            {"params": parameters[1::2], "lr": 0.5},
        ]
        inner = torch.optim.AdamW(groups, lr=0.1)
        return parameters, GuardedOptimizer(
            inner, max_norm=0.7, clip_scope=scope, flat_buckets=flat
        )

    runs = []
    for is_flat in (False, True):
        parameters, opt = build(is_flat)
        for step in range(4):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = sum(
                (p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum().double()
                for p in parameters
            )
            loss.backward()
            if step == 2:
                parameters[3].grad.fill_(NAN)
            opt.step(loss=loss)
        runs.append((snapshot(opt), opt.records(), opt.last))
    (plain, plain_records, plain_last), (flat, flat_records, flat_last) = runs
    for key in plain:
        torch.testing.assert_close(flat[key], plain[key], rtol=1e-6, atol=1e-7)
    for a, b in zip(flat_records, plain_records, strict=True):
        assert (a.action, a.culprits) == (b.action, b.culprits)
        assert a.total_norm == pytest.approx(b.total_norm, rel=1e-7)
    torch.testing.assert_close(flat_last.clip_coef, plain_last.clip_coef, rtol=1e-6, atol=0.0)


@settings(max_examples=40)
@given(data=st.data())
def test_any_sequence_of_replacements_equals_no_flat_buckets(data):
    shapes = [(2, 3), (5,), (), (3, 2)]
    ours, theirs = new_parameters(shapes), new_parameters(shapes)
    make = torch.optim.SGD
    opt = GuardedOptimizer(make(ours, lr=0.1, weight_decay=0.1), flat_buckets=True)
    plain = GuardedOptimizer(make(theirs, lr=0.1, weight_decay=0.1))
    for step in range(4):
        if data.draw(st.booleans()):
            opt.zero_grad()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            choice = data.draw(st.sampled_from([*range(len(REPLACEMENTS)), "none", "keep"]))
            value = torch.full(p.shape, float(step + 1 + i))
            if choice == "none":
                p.grad = q.grad = None
            elif choice == "keep" or p.grad is None:
                q.grad = None if p.grad is None else p.grad.clone()
            else:
                REPLACEMENTS[choice](p, value)
                q.grad = p.grad.clone()
        opt.step()
        plain.step()
    assert all(map(torch.equal, ours, theirs))
    for a, b in zip(opt.records(), plain.records(), strict=True):
        assert a.total_norm == pytest.approx(b.total_norm, rel=1e-7)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
def test_a_copy_has_slots_of_its_own(copied, trusted):
    model = nn.Linear(3, 2)
    model.flat = FlatGradBuckets(model.named_parameters(), trusted=trusted)
    twin = copied(model)
    twin(torch.ones(1, 3)).sum().backward()
    assert twin.flat.measure().total_norm.item() == pytest.approx(8**0.5)
    assert model.flat.measure().total_norm == 0.0
    assert attached(twin.flat)


def test_old_slots_are_freed_when_a_param_group_is_added():
    a, b = new_parameters([(3,), (4,)])
    opt = GuardedOptimizer(torch.optim.SGD([a], lr=0.1), flat_buckets=True)
    a.grad.fill_(1.0)
    old = weakref.ref(opt._gradients.flat)
    opt.add_param_group({"params": [b]})
    b.grad = torch.ones(4)
    opt.step()
    gc.collect()
    assert old() is None
    assert attached(opt._gradients.flat)
    assert opt.records()[0].total_norm == pytest.approx(7**0.5)


def test_gradient_views_of_distributed_data_parallel_are_used_where_they_are(tmp_path):
    """It accumulates into its own buckets and must find them again."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    try:
        a, b = model_of(), model_of()
        ddp = nn.parallel.DistributedDataParallel(a, gradient_as_bucket_view=True)
        for step in range(2):  # it lays its buckets out anew after the first backward
            ddp.zero_grad()
            backward(ddp, step)
        buckets = [p.grad.data_ptr() for p in a.parameters()]
        opt = GuardedOptimizer(torch.optim.SGD(a.parameters(), lr=0.1), flat_buckets=True)
        plain = GuardedOptimizer(torch.optim.SGD(b.parameters(), lr=0.1))
        for step in range(3):
            opt.zero_grad()
            assert [p.grad.data_ptr() for p in a.parameters()] == buckets
            plain.zero_grad()
            backward(ddp, step)
            backward(b, step)
            opt.step()
            plain.step()
            assert [p.grad.data_ptr() for p in a.parameters()] == buckets
        assert all(map(torch.equal, a.parameters(), b.parameters()))
    finally:
        dist.destroy_process_group()


# Wrong use.


def test_what_has_no_dense_real_gradient_is_refused_and_nothing_is_attached():
    good = nn.Parameter(torch.zeros(2))
    for bad, message in (
        (nn.Parameter(torch.zeros(2, dtype=torch.complex64)), "parameter 1 is torch.complex64"),
        (good, "parameter 1 appears twice"),
        ("weight", "parameter 1 is a str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            FlatGradBuckets([good, bad])
        assert good.grad is None
    for nothing in ([], [torch.zeros(2)]):
        with pytest.raises(ValueError, match="no parameter that needs a gradient"):
            FlatGradBuckets(nothing)
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        FlatGradBuckets(p for p in ())


def test_a_sparse_gradient_that_exists_is_refused_and_nothing_is_attached():
    (dense,) = new_parameters([(3,)])
    dense.grad = grad = torch.ones(3)
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="use sparse=False"):
        FlatGradBuckets([dense, embedding.weight])
    assert dense.grad is grad


def test_a_sparse_gradient_is_refused_before_anything_changes():
    embedding = nn.Embedding(5, 2, sparse=True)
    flat = FlatGradBuckets(embedding.parameters())
    embedding.weight.grad = None
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="use sparse=False"):
        flat.measure()
    assert embedding.weight.grad.is_sparse
    flat.zero_()
    embedding(torch.tensor([1, 1])).sum().backward()  # accumulates into the dense slot
    assert flat.measure().total_norm.item() == pytest.approx(8**0.5)
