"""`Diagnosis`: the findings of all checks, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fastguard.diagnosis.finding import SEVERITIES, Finding, Severity
from fastguard.records import strict_json


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of `fastguard.diagnose`; iterating over it yields the findings.

    Attributes:
        findings: Most important first: errors, warnings, notes, then one `"ok"` for each family of
            checks with neither errors nor warnings.
        seconds: How long the diagnosis took.
    """

    findings: tuple[Finding, ...]
    seconds: float

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def of(self, *kinds: str) -> list[Finding]:
        """Returns the findings of these kinds.

        Args:
            *kinds: Kinds such as `"shape-mismatch"`; all are listed in `fastguard.diagnosis.KINDS`.
        """
        return [finding for finding in self.findings if finding.kind in kinds]

    def at_least(self, severity: Severity) -> list[Finding]:
        """Returns the findings that are at least as severe as `severity`."""
        bad = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return [finding for finding in self.findings if finding.severity in bad]

    @property
    def errors(self) -> list[Finding]:
        """The findings of severity `"error"`."""
        return self.at_least("error")

    @property
    def worst(self) -> Severity:
        """The severity of the worst finding."""
        return self.findings[0].severity if self.findings else "ok"

    @property
    def ok(self) -> bool:
        """Whether there are neither errors nor warnings."""
        return not self.at_least("warning")

    @property
    def verdict(self) -> str:
        """One sentence: `2 errors, 1 warning, 3 notes in 0.8 s`."""
        n = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES[:3]}
        counts = [f"{count} {s}{'s' * (count > 1)}" for s, count in n.items() if count]
        return f"{', '.join(counts) or 'no problems'} in {self.seconds:.1f} s"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values: verdict, worst severity, seconds, and the findings as dicts."""
        return {
            "verdict": self.verdict,
            "worst": self.worst,
            "seconds": self.seconds,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def to_json(self) -> str:
        """Returns `as_dict()` as JSON; NaN and Inf become the strings `"NaN"`, `"Infinity"`."""
        return strict_json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        """Formats the findings for users, followed by the verdict."""
        return "\n".join([*map(str, self.findings), self.verdict])
