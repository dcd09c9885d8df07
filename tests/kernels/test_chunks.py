"""The chunk table contains each element once, aligned, and in the right segment."""

import math
import random

import numpy as np
import pytest
import torch

from fastguard.gradients import layout_guards
from fastguard.gradients.buckets import GradBucket, Run, bucketize
from fastguard.kernels import chunk_layout, chunks
from fastguard.kernels.columns import FIRST_BYTE, FIRST_PIECE, PIECES, STRETCH
from fastguard.kernels.recount import RECOUNT_SIZE


def table(grads, segments=None, n_segments=1, n_programs=3):
    """Returns chunks and pieces with absolute addresses, starts, and copies."""
    bucket = bucketize(grads, segments=segments, n_segments=n_segments).buckets[0]
    return host_table(bucket, n_segments, n_programs)


def host_table(bucket, n_segments, n_programs):
    places, copies = chunks.places_of(bucket, [g.data_ptr() for g in bucket.grads])
    rows, pieces, starts = chunks.cut(bucket, places, n_segments, n_programs)
    rows = rows.copy()
    stretch, first = rows[:, STRETCH.value], rows[:, FIRST_BYTE.value]
    holder = np.zeros(len(pieces), dtype=np.int64)
    for s, piece, count in rows[:, [STRETCH.value, FIRST_PIECE.value, PIECES.value]].tolist():
        holder[piece : piece + count] = s
    pieces = pieces.copy()
    pieces[:, 0] += places.base[holder] if len(pieces) else 0
    rows = np.concatenate([(places.base[stretch] + first)[:, None], rows[:, 2:]], axis=1)
    return rows, pieces, starts, copies


def covered(rows, item):
    """Returns the sorted addresses of all elements in a table."""
    parts = [np.arange(n) * item + address for address, n in rows[:, :2]]
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_each_element_is_in_the_table_once_and_aligned(dtype):
    rng = random.Random(3)
    flat = torch.zeros(60000, dtype=dtype)
    grads, at = [], 0
    while at < 40000:
        at += rng.randrange(3)
        n = rng.choice([0, 1, 2, 7, 8, 9, 100, 4096, 9000])
        grads.append(flat[at : at + n])
        at += n
    segments = [rng.randrange(4) for _ in grads]
    rows, pieces, starts, copies = table(grads, segments, 5)
    item = dtype.itemsize
    want = np.concatenate([np.arange(g.numel()) * item + g.data_ptr() for g in grads])
    assert np.array_equal(covered(rows, item), np.sort(want))
    assert np.array_equal(covered(pieces, item), np.sort(want))
    assert not copies
    vec = 16 // item
    assert all(address % 16 == 0 for address, n, *_ in rows.tolist() if n >= vec)
    assert np.all(np.diff(rows[:, 2]) >= 0)
    for s in range(5):
        assert np.all(rows[starts[s] : starts[s + 1], 2] == s)
    for address, n, segment, first, count in rows.tolist():
        end = address + n * item
        mine = pieces[first : first + count]
        overlap = np.minimum(mine[:, 0] + mine[:, 1] * item, end) - np.maximum(mine[:, 0], address)
        assert np.all(overlap > 0) and overlap.sum() == n * item
        assert all(segments[t] == segment for t in mine[:, 2])


def test_adjacent_views_of_one_buffer_share_a_stretch_in_either_direction():
    flat = torch.zeros(96)
    views = list(flat.split(8))
    assert len(table(views)[0]) == 1
    assert len(table(views[::-1])[0]) == 1
    assert len(table(views, [0] * 6 + [1] * 6, 2)[0]) == 2
    assert len(table([views[0], views[2], views[1]])[0]) > 1  # not adjacent in the list


def test_tensors_that_are_adjacent_by_chance_are_not_joined():
    """Otherwise the order of summation would depend on the allocator."""
    flat = torch.zeros(64)
    storage = flat.untyped_storage()
    a = torch.empty(0).set_(storage, 0, (32,))
    b = torch.zeros(32)
    assert len(table([a, b])[0]) == 2


def test_small_models_get_small_chunks():
    assert chunk_layout.chunk_size(100, 396) == chunk_layout.MIN_CHUNK
    assert chunk_layout.chunk_size(10**10, 396) == chunk_layout.MAX_CHUNK
    assert (
        chunk_layout.MIN_CHUNK < chunk_layout.chunk_size(30_000_000, 396) < chunk_layout.MAX_CHUNK
    )


@pytest.mark.parametrize("n_programs", [264, 396, 324])
@pytest.mark.parametrize("megabytes", [256, 512, 1024, 2048])
@pytest.mark.parametrize("item", [2, 4])
def test_all_programs_finish_together(n_programs, megabytes, item):
    """The last round is nearly full, so programs are idle for at most 4 % of the time."""
    n = megabytes * 2**20 // item
    size = chunk_layout.chunk_size(n, n_programs)
    rounds = math.ceil(math.ceil(n / size) / n_programs)
    assert (
        size % chunk_layout.MIN_CHUNK == 0
        and chunk_layout.MIN_CHUNK <= size <= chunk_layout.MAX_CHUNK
    )
    assert rounds * size * n_programs <= 1.04 * n


def test_a_chunk_can_be_recounted():
    """Each lane has 10 bits for the count of NaN."""
    assert chunk_layout.MAX_CHUNK // RECOUNT_SIZE.value < 2**10


def test_a_table_without_elements_is_empty():
    rows, pieces, starts, _ = table([torch.zeros(0)])
    assert len(rows) == len(pieces) == 0 and starts.tolist() == [0, 0]


def test_strides_with_holes_and_overlaps_get_a_buffer():
    x = torch.zeros(8, 8)
    assert not table([x.t(), torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)])[3]
    assert [i for i, _ in table([x[:, ::2], torch.zeros(1)])[3]] == [0]
    assert [i for i, _ in table([x, x])[3]] == [1]
    assert [i for i, _ in table([torch.zeros(1).expand(5)])[3]] == [0]


def test_a_run_is_one_stretch_and_its_tensors_are_pieces():
    flat = torch.zeros(100)
    grads = [flat[:10], flat[50:90]]
    bucket = GradBucket(flat.device, flat.dtype, grads, [4, 9], [0, 0], runs=(Run(flat, 0),))
    rows, pieces, _, _ = host_table(bucket, 1, 3)
    assert rows[:, 1].tolist() == [100] and rows[0, 3:].tolist() == [0, 2]
    assert pieces[:, 1:].tolist() == [[10, 4], [40, 9]]


def cached(grads, **options):
    return chunks.table_of(bucketize(grads, **options).buckets[0], options.get("n_segments", 1), 3)


def test_the_table_is_cached_while_addresses_stay():
    grads = [torch.zeros(5), torch.zeros(7)]
    first = cached(grads)
    assert cached(list(grads)) is first
    assert cached([grads[0], None, grads[1]]) is not first  # the tensors have other ids
    assert cached([grads[0]]) is not first
    assert cached(grads) is first
    assert cached(grads, segments=[0, 1], n_segments=2) is not first
    assert cached([grads[0], torch.zeros(7)]) is not first
    assert cached([grads[0][:3], grads[1]]) is not first  # same address, fewer elements


def test_a_step_looks_up_its_gradients_once(monkeypatch):
    bucket = bucketize([torch.randn(100), torch.randn(200)]).buckets[0]
    table = chunks.table_of(bucket, 1, 3)
    monkeypatch.setattr(chunks, "_key", None)  # the lookup that apply must not repeat
    assert chunks.table_of(bucket, 1, 3) is table


def test_other_strides_at_the_same_address_have_another_table():
    x = torch.arange(100.0)
    assert cached([x[:50]]) is not cached([x[::2]])


def test_each_form_of_a_long_list_at_the_same_addresses_has_its_own_table():
    """Long lists are recognized by their form, without reading their sizes again."""
    x = torch.randn(layout_guards.MIN_TENSORS, 12)
    looks = {
        "rows": lambda: [row[:6] for row in x],
        "shorter": lambda: [row[:5] for row in x],
        "folded": lambda: [row[:6].view(2, 3) for row in x],
        "with holes": lambda: [row[::2] for row in x],
    }
    tables = {}
    for _ in range(2):
        for name, look in looks.items():
            bucket = bucketize(look()).buckets[0]
            assert bucket.form is not None
            table = chunks.table_of(bucket, 1, 3)
            assert tables.setdefault(name, table) is table
            pieces = table.layout.pieces.view(-1, 3)
            assert pieces[:, 1].tolist() == [look()[0].numel()] * layout_guards.MIN_TENSORS
            assert len(table.copies) == (layout_guards.MIN_TENSORS if name == "with holes" else 0)
    assert len(set(map(id, tables.values()))) == len(looks)


def test_old_tables_are_dropped():
    grads = [torch.zeros(4) for _ in range(chunks.TABLES + 1)]
    first = cached(grads[:1])
    for grad in grads[1:]:
        cached([grad])
    assert cached(grads[:1]) is not first


def test_a_flat_bucket_keeps_its_table(monkeypatch):
    """The slots never move, so a step neither reads their addresses again nor uses the cache."""
    flat = torch.zeros(100)
    flags = (flat.device, flat.dtype, [flat[:10], flat[50:90]], [0, 1], [0, 0])
    bucket = GradBucket(*flags, runs=(Run(flat, 0),))
    table = chunks.table_of(bucket, 1, 3)
    other = GradBucket(*flags[:3], [3, 4], [0, 0], runs=(Run(flat, 0),))
    assert chunks.table_of(other, 1, 3) is not table
    monkeypatch.setattr(chunks, "_found_or_built", None)
    assert chunks.table_of(bucket, 1, 3) is table


def moving(sizes, offset=0, dtype=torch.float32, n=2):
    """Returns the same list of gradients at several addresses, and keeps all lists alive."""
    flat = [torch.randn(sum(sizes) + 64, dtype=dtype) for _ in range(n)]
    return [[part.clone() for part in f[offset : offset + sum(sizes)].split(sizes)] for f in flat]


def test_only_addresses_are_uploaded_when_gradients_move(monkeypatch):
    """An 8B model has 122,593 chunks and 291 addresses."""
    uploads = []
    upload = chunks.upload
    monkeypatch.setattr(
        chunks, "upload", lambda n, *rest: uploads.append(n.size) or upload(n, *rest)
    )
    here, there = moving([5000, 7, 9000])
    first, second = cached(here), cached(there)
    assert second is not first and second.layout is first.layout
    assert uploads[1:] == [3, 3]
    for grads, one in ((here, first), (there, second)):
        assert one.addresses.tolist() == [g.data_ptr() for g in grads]


def test_another_alignment_has_another_layout():
    flat = torch.randn(200)
    first, second = cached([flat[:50]]), cached([flat[101:151]])
    assert second.layout is not first.layout
    assert cached([flat[60:110]]).layout is first.layout  # 240 bytes later, with the same alignment


def test_tensors_that_are_no_longer_adjacent_have_another_layout():
    flat = torch.randn(64)
    joined = cached([flat[:32], flat[32:]])
    parted = cached([flat[:32], torch.randn(32)])
    assert joined.addresses.numel() == 1 and parted.addresses.numel() == 2
    assert joined.layout is not parted.layout


def test_moved_gradients_have_the_same_sums():
    """The layout of the first list is reused for the second."""
    from fastguard.stages import triton as triton_stages

    here, _ = moving([5000, 7, 9000])
    there = [g.clone() for g in here]
    summaries = [
        triton_stages.measure_bucket(bucketize(g).buckets[0], 1, 3, 2.0)[0] for g in (here, there)
    ]
    assert torch.equal(*summaries)


@pytest.mark.parametrize("gaps", [False, True], ids=["contiguous", "gaps"])
def test_the_form_of_a_known_list_says_whether_all_are_contiguous(gaps, monkeypatch):
    """The strides of the gradients are then not read again, which saves 0.06 µs per tensor."""

    def asked(_):
        raise AssertionError("a gradient of a known layout was asked for its strides")

    def gradients():
        last = torch.ones(3, 8)[:, ::2] if gaps else torch.ones(3, 4)
        return [*(torch.ones(3, n) for n in range(1, 6)), last]

    bucketize(gradients())
    bucket = bucketize(gradients()).buckets[0]
    assert bucket.form is not None and bucket.form.contiguous is not gaps
    if not gaps:
        monkeypatch.setattr(torch.Tensor, "is_contiguous", asked)
    copies = host_table(bucket, 1, 3)[-1]
    assert [i for i, _ in copies] == ([5] if gaps else [])
