"""`"replica_drift"`: checks that replicas are bitwise equal, by checksums.

    c = sum over all elements of their bits, mod 2**32             for gradients and for weights

The sum depends neither on the order of the elements nor on their distribution over tensors, and a
single flipped bit always changes it: see `fastguard.stages.watch`. Each half of c (16 bits) is
added to the vector that the ranks exchange, as three integers, which float64 sums exactly for up to
2**17 ranks:

    P = sum c_r      Q = sum c_r^2      R = sum u_r c_r            u_r: a fixed number per rank

All c_r are equal if and only if n Q = P^2 (Cauchy-Schwarz). If a single rank differs, by d, then
n Q - P^2 = (n - 1) d^2 gives d up to its sign, P gives the common value, and R the rank. These are
12 numbers, 96 bytes, for any number of ranks. With two ranks, it cannot be told which one differs.

I/O: one read of gradients and weights in a watched step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastguard.gradients.buckets import FLOATING, bucketize
from fastguard.gradients.tensor_kinds import PLAIN, wraps
from fastguard.gradients.transfer import moved, numbers_on
from fastguard.guard.watch.quantity import Reading, WatchedGradients
from fastguard.stages.contract import Known
from fastguard.stages.reference_watch import sum_of_bits
from fastguard.stages.watch import WORD, read_bits

HALF = 0xFFFF
MEASURED = frozenset({*FLOATING, torch.complex32, torch.complex64, torch.complex128})
WATCHED = ("gradients", "weights")


class ReplicaDrift:
    """Finds the replica whose gradients or weights differ from the other replicas."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads P, Q and R of the low and high halves of two checksums, float64 `(12,)`."""
        assert step.sharing is not None
        team = step.sharing.team
        ranks = dist.get_process_group_ranks(team.group)
        found = [step.checksum(), checksum(step.all_weights(), step.device)]
        halves = [half for c in found for half in (c & HALF, c >> 16)]
        c = torch.stack(halves).double()
        mine = numbers_on([_number_of(ranks.index(team.rank))], step.device)
        values = torch.cat([c, c * c, c * mine])

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            p, q, r = (list(map(int, numbers[4 * k : 4 * k + 4])) for k in range(3))
            suspects = {}
            for k, what in enumerate(WATCHED):
                sums = [(p[i], q[i], r[i]) for i in (2 * k, 2 * k + 1)]
                suspects[what] = [ranks[i] for i in differing(len(ranks), sums)]
            return {"replica_drift": suspects}

        return Reading(values, results, sums_over_ranks=True)


def checksum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the checksum of tensors of any dtype, int64 `()` in `[0, 2**32)`, on `device`.

    Waits for a GPU only to move the sums to another device.

    Raises:
        TypeError: A tensor wraps others.
    """
    others: list[Tensor] = []
    if not set(map(attrgetter("dtype"), tensors)) <= MEASURED:  # dtypes such as integers
        others = [t for t in tensors if t.dtype not in MEASURED]
        tensors = [t for t in tensors if t.dtype in MEASURED]
    buckets = bucketize(tensors, device=device)
    if buckets.kind is not PLAIN:
        wrapped = next((type(t).__name__ for t in tensors if wraps(type(t))), "placeholder")
        raise TypeError(
            "watch holds 'replica_drift', which reads the memory of weights, but a weight is a "
            f"{wrapped}, which wraps other tensors; remove 'replica_drift' from watch"
        )
    _, total = read_bits(buckets, nonzero=False, checksum=True)
    for t in others:
        total = total + moved(sum_of_bits(t.detach()), device)
    return total & WORD if others else total


def _number_of(i: int) -> int:
    """Returns u of the i-th rank: 20 hashed bits, so that a wrong sign of d matches no rank."""
    x = (i + 1) * 2654435761 & WORD
    x = (x ^ x >> 16) * 73244475 & WORD
    return (x ^ x >> 16) & 0xFFFFF


def differing(n: int, sums: Sequence[tuple[int, int, int]]) -> list[int]:
    """Returns the rank that differs; all ranks if that rank is unknown; no rank if all are equal.

    Args:
        n: The number of ranks.
        sums: P, Q and R of values that should be equal on all ranks.
    """
    found = [_suspects(n, *each) for each in sums if n * each[1] != each[0] ** 2]
    if not found:
        return []
    common = set.intersection(*found)
    return sorted(common) if len(common) == 1 else list(range(n))


def _suspects(n: int, p: int, q: int, r: int) -> set[int]:
    """Returns the ranks for which the sums are consistent with only this rank differing."""
    squared, rest = divmod(n * q - p * p, n - 1)
    d = math.isqrt(max(squared, 0))
    if rest or d * d != squared:
        return set()
    numbers = list(map(_number_of, range(n)))
    found: set[int] = set()
    for delta in (d, -d):
        common, left = divmod(p - delta, n)
        own, odd = divmod(r - common * sum(numbers), delta)
        if not left and not odd and 0 <= common <= HALF:
            found.update(i for i, number in enumerate(numbers) if number == own)
    return found
