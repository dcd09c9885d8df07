"""`Watched`: collects what `GuardedOptimizer(watch=...)` recorded, and formulates the findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastguard.commands.report.layer_history import LayerHistory
from fastguard.errors import plural
from fastguard.errors.plain_text import printable
from fastguard.records.layers import layer_norms, layer_ratios
from fastguard.records.step_record import REPLICA_DRIFT, replica_drifts

LARGE, SMALL = 1e-2, 1e-5
"""Bounds of |update| / |weight|, averaged over a run; about 1e-3 is healthy."""

_MAX_NAMED = 3
_MAX_FORMATS = 16
_MAX_DRIFTS = 64
_FEW = 3  # minimum number of watched steps for an average
_UNDERFLOW = 0.01
_LARGEST = 1e300
_BATCH_TOO_SMALL = 2.0


@dataclass(slots=True)
class Watched:
    """The measurements of the watched steps of a run.

    Attributes:
        norms: Gradient norm by layer.
        ratios: |update| / |weight| by layer.
        noise: The last noise scale and its step, or None.
        underflow: The largest share of gradients below the smallest normal number of a format, and
            its step, by format.
        drifts: Number of steps by phrase that says which replicas differ.
        drifted_first: The first step in which replicas differed.
        drifting: Whether they differed in the last step that compared them.
    """

    norms: LayerHistory = field(default_factory=LayerHistory)
    ratios: LayerHistory = field(default_factory=LayerHistory)
    noise: tuple[float, int] | None = None
    underflow: dict[str, tuple[float, int]] = field(default_factory=dict)
    drifts: Counter[str] = field(default_factory=Counter)
    drifted_first: int = 0
    drifting: bool = False

    def add(self, step: int, watch: object) -> None:
        """Adds the `watch` of one record; values of an unexpected type are ignored."""
        if not isinstance(watch, Mapping):
            return
        self.norms.add(step, layer_norms(watch))
        self.ratios.add(step, layer_ratios(watch))
        if REPLICA_DRIFT in watch:
            self._compare(step, watch)
        noise = watch.get("noise_scale")
        if isinstance(noise, (int, float)) and abs(noise) < _LARGEST:
            self.noise = float(noise), step
        shares = watch.get("underflow")
        for name, share in shares.items() if isinstance(shares, Mapping) else ():
            if isinstance(name, str) and isinstance(share, (int, float)) and 0 <= share <= 1:
                name = printable(name, 40)
                if name in self.underflow or len(self.underflow) < _MAX_FORMATS:
                    self.underflow[name] = max(self.underflow.get(name, (0.0, step)), (share, step))

    def _compare(self, step: int, watch: Mapping[str, object]) -> None:
        phrases = replica_drifts(watch)
        if phrases and not self.drifts:
            self.drifted_first = step
        self.drifting = bool(phrases)
        for phrase in phrases:
            phrase = printable(phrase, 80)
            if phrase in self.drifts or len(self.drifts) < _MAX_DRIFTS:
                self.drifts[phrase] += 1

    def findings(self) -> Iterator[str]:
        """Yields one sentence per finding."""
        yield from self._drift()
        yield from self._growth()
        yield from self._ratios()
        yield from self._batch()
        yield from self._underflow()

    def _drift(self) -> Iterator[str]:
        for phrase, n in self.drifts.most_common(1):
            now = "" if self.drifting else ", but not in the last step that compared the replicas"
            yield (
                f"{phrase[0].upper()}{phrase[1:]} in {plural(n, 'watched step')}{now}. Restore a "
                f"checkpoint from before step {self.drifted_first:,}."
            )

    def _growth(self) -> Iterator[str]:
        growths = self.norms.growths()
        if not growths:
            return
        first, others = growths[0], len(growths) - 1
        followed = f"; {plural(others, 'other layer')} followed" if others else ""
        yield (
            f"Layer “{first.layer}” grew first: at step {first.step:,} its gradient norm was "
            f"{first.factor:,.0f} times its usual value{followed}."
        )

    def _ratios(self) -> Iterator[str]:
        means = {
            layer: self.ratios.mean(layer)
            for layer in self.ratios.layers
            if self.ratios.count(layer) >= _FEW
        }
        large = {layer: mean for layer, mean in means.items() if mean > LARGE}
        small = {layer: mean for layer, mean in means.items() if mean < SMALL}
        if large:
            named = _named(large, largest_first=True)
            yield f"Layers with large updates (|update| / |weight|, usually 1e-3): {named}."
        if small:
            named = _named(small, largest_first=False)
            yield f"Layers that hardly change (|update| / |weight|, usually 1e-3): {named}."

    def _batch(self) -> Iterator[str]:
        if self.noise is not None and self.noise[0] >= _BATCH_TOO_SMALL:
            yield (
                f"The batch could be about {self.noise[0]:,.0f} times as large, according to the "
                f"gradient noise scale at step {self.noise[1]:,}."
            )

    def _underflow(self) -> Iterator[str]:
        lost = [
            f"{share:.1%} in {name} (step {step:,})"
            for name, (share, step) in self.underflow.items()
            if share > _UNDERFLOW
        ]
        if lost:
            yield f"Largest share of gradients below the smallest normal number: {', '.join(lost)}."


def _named(means: dict[str, float], *, largest_first: bool) -> str:
    layers = sorted(means, key=lambda layer: means[layer], reverse=largest_first)
    text = ", ".join(f"“{layer}” {means[layer]:.2g}" for layer in layers[:_MAX_NAMED])
    more = len(layers) - _MAX_NAMED
    return f"{text} and {more:,} more" if more > 0 else text
