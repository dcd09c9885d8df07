"""Checks batches for non-finite and extreme values, invalid labels, and duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastguard.diagnosis.batch_check import read_batch
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, percent
from fastguard.diagnosis.replay.calls import floats
from fastguard.diagnosis.replay.subject import tensors
from fastguard.diagnosis.replay.tensor_range import TensorRange
from fastguard.diagnosis.watch_functions import Indices, indices_of
from fastguard.errors import describe_culprits

CHECK = Family("data")

RANGE = 100.0  # normalized inputs reach about 5; raw images reach 255
MIN_LABELS = 16  # fewer labels may all be equal by chance
MIN_ELEMENTS = 4  # samples with fewer elements may be equal by chance


def check(evidence: Evidence) -> Iterator[Finding]:
    """Checks the batch and `data`; labels are checked against the loss that uses them."""
    found: dict[str, Finding] = {}
    for prefix, inputs, targets in evidence.batches():
        if (empty := _empty(prefix, inputs)) is not None:
            found.setdefault(empty.kind, empty)
            continue
        for finding in _of_batch(prefix, inputs, targets, harmful=evidence.explained is not None):
            found.setdefault(finding.kind + finding.where.removeprefix(prefix), finding)
    yield from found.values()
    yield from _indices(evidence)
    yield from _binary_targets(evidence)
    yield from _duplicates(evidence)


def _empty(prefix: str, inputs: Any) -> Finding | None:
    known = list(_named(f"{prefix}inputs", inputs))
    if not known or any(tensor.numel() for _, tensor in known):
        return None
    name, tensor = known[0]
    return CHECK.error(
        "empty-batch",
        f"there are no samples: {list(tensor.shape)}; so the mean of the losses is 0/0, which is "
        "NaN",
        where=name,
        value=0,
        limit=1,
        remedy="check the sampler, and the code that filters samples; a DataLoader with "
        "drop_last=True drops a partial batch.",
    )


def _of_batch(prefix: str, inputs: Any, targets: Any, harmful: bool) -> Iterator[Finding]:
    """Checks one batch.

    If the step is `harmful` (not finite), a -Inf in the batch may be more than a mask.
    """
    names = (f"{prefix}inputs", f"{prefix}targets")
    high = {f"{prefix}inputs*": RANGE}
    low = {f"{prefix}inputs*": -RANGE}
    known = {}
    for name, part in zip(names, (inputs, targets), strict=True):
        known |= {n: t for n, t in _named(name, part)}
    for problem in read_batch((inputs, targets), low=low, high=high, names=names).problems():
        tensor = known.get(problem.name)
        if tensor is None or not tensor.is_floating_point():
            continue
        values = TensorRange.of(problem.name, tensor)
        if problem.kind == "nonfinite":
            if values.nan or values.posinf or harmful:
                yield _nonfinite(values)
            # with a NaN, the range is unknown
            if problem.name.startswith(names[0]) and values.absmax > RANGE:
                yield _range(values)
        elif problem.kind == "constant":
            yield _constant(values)
        else:
            yield _range(values)
    for name, tensor in known.items():
        is_labels = name.startswith(names[1]) and not tensor.is_floating_point()
        if is_labels and tensor.numel() >= MIN_LABELS and (tensor == tensor.flatten()[0]).all():
            yield CHECK.warning(
                "one-label",
                f"all {tensor.numel()} labels are {int(tensor.flatten()[0])}",
                where=name,
                value=tensor.numel(),
                remedy="shuffle the data, and check that the labels are read from the right place.",
            )


def _named(name: str, part: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors with the names that `check_batch` gives them."""
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from _named(f"{name}.{key}", value)
    elif isinstance(part, list | tuple):
        for i, value in enumerate(part):
            yield from _named(f"{name}[{i}]", value)


def _nonfinite(values: TensorRange) -> Finding:
    counts = describe_culprits([(values.name, values.nan, values.posinf, values.neginf)])
    return CHECK.error(
        "nonfinite-data",
        f"{percent(1 - values.finite_share)} of {values.numel} elements are not finite: {counts}",
        where=values.name,
        value=1 - values.finite_share,
        limit=0,
        remedy="find the samples (x.isfinite().flatten(1).all(1)) and repair or drop these samples "
        "where the data is read; fastguard.check_batch checks every batch without a sync.",
    )


def _constant(values: TensorRange) -> Finding:
    return CHECK.warning(
        "constant-data",
        f"all {values.numel} elements are {values.max:.4g}",
        where=values.name,
        value=values.max,
        remedy="check how the data is read and normalized (a division by a standard deviation of "
        "0, an integer division by 255); nothing can be learned from constant data.",
    )


def _range(values: TensorRange) -> Finding:
    return CHECK.warning(
        "range",
        f"ranges from {values.min:.4g} to {values.max:.4g}; networks expect inputs with a "
        "magnitude of about 1",
        where=values.name,
        value=values.absmax,
        limit=RANGE,
        remedy="normalize the inputs: divide images by 255, or subtract the mean of the training "
        "data and divide by its standard deviation plus an eps.",
    )


def _indices(evidence: Evidence) -> Iterator[Finding]:
    seen = evidence.step.functions.indices
    yield from (_bad_indices(found, "") for found in seen if found.bad_share)
    losses = [found for found in seen if found.function != "embedding"]
    if len(losses) != 1:  # with several losses it is unclear which targets belong to which loss
        return
    loss = losses[0]
    for i, (_, targets) in enumerate(_pairs(evidence.further_batches)):
        for tensor in (t for t in tensors(targets) if not t.is_floating_point() and t.numel()):
            found = indices_of(loss.function, tensor, loss.n, loss.ignored)
            if found.bad_share:
                yield _bad_indices(found, f"data[{i}].targets")
                return


def _pairs(batches: list[Any]) -> Iterator[tuple[Any, Any]]:
    for batch in batches:
        if isinstance(batch, list | tuple) and len(batch) == 2:
            yield batch[0], batch[1]


def _bad_indices(found: Indices, where: str) -> Finding:
    tokens = found.function == "embedding"
    ignored = "" if found.ignored is None else f" and {found.ignored}, which is ignored"
    return CHECK.error(
        "index-out-of-range",
        f"{percent(found.bad_share)} of the {'indices' if tokens else 'labels'} given to "
        f"{found.function} are out of range: they go from {found.low} to {found.high}; expected "
        f"0 to {found.n - 1}{ignored}",
        where=where or ("inputs" if tokens else "targets"),
        value=found.high if found.high >= found.n else found.low,
        limit=found.n - 1 if found.high >= found.n else 0,
        remedy="make the embedding as large as the vocabulary of the tokenizer."
        if tokens
        else "count classes from 0, give the last layer one output per class, and mark positions "
        "to skip with ignore_index. On a GPU, an index out of range causes a device-side assert.",
    )


def _binary_targets(evidence: Evidence) -> Iterator[Finding]:
    for low, high in evidence.step.functions.binary_targets:
        if low < 0 or high > 1:
            yield CHECK.error(
                "target-out-of-range",
                f"binary cross-entropy got targets from {low:.4g} to {high:.4g}; for targets "
                "outside of 0 to 1, this loss has no lower bound",
                where="targets",
                value=high if high > 1 else low,
                limit=1 if high > 1 else 0,
                remedy="divide masks of 0 and 255 by 255, or use (mask > 0).float().",
            )
            return


def _duplicates(evidence: Evidence) -> Iterator[Finding]:
    # The batch itself is probably also in `data`.
    batches = evidence.further_batches or [evidence.subject.batch]
    seen: dict[bytes, bytes] = {}
    n = again = contradicting = 0
    for inputs, targets in _pairs(batches):
        for sample, target in _samples(inputs, targets):
            n += 1
            if sample in seen:
                again += 1
                contradicting += seen[sample] != target
            seen.setdefault(sample, target)
    if not again:
        return
    kind = "contradicting-labels" if contradicting else "duplicates"
    twice = f"{again} of {n} samples are copies of an earlier sample"
    yield CHECK.warning(
        kind,
        f"{twice}, {contradicting} of them with another target" if contradicting else twice,
        where="data" if evidence.further_batches else "batch",
        value=again / n,
        limit=0,
        remedy="look for files that are listed twice, a sampler with replacement, workers that "
        "share a seed, and leaks between training and validation.",
    )


def _samples(inputs: Any, targets: Any) -> Iterator[tuple[bytes, bytes]]:
    """Yields a hash of each sample's inputs and targets, along the first axis of every tensor."""
    first, second = tensors(inputs), tensors(targets)
    sizes = {t.shape[0] if t.ndim else 0 for t in (*first, *second)}
    if len(sizes) != 1 or not first or sum(t[:1].numel() for t in first) < MIN_ELEMENTS:
        return
    if any(float(t.float().std()) == 0 for t in floats(first) if t.numel() > 1):
        return  # constant data has its own finding
    for i in range(sizes.pop()):
        yield _digest([t[i] for t in first]), _digest([t[i] for t in second])


def _digest(parts: list[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))  # type: ignore[arg-type]  (arrays are buffers)
    return digest.digest()
