"""Output of `fastguard ckpt`: one line per result, or with `--json` one object at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastguard.commands.terminal import print_table, say
from fastguard.records.strict_json import dumps, strict


class Answer:
    """Prints each result, or collects all of them and prints one JSON object at the end.

    Args:
        as_json: Whether to collect the results for `end` instead of printing them.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._found: list[dict[str, Any]] = []

    def say(self, line: str, **facts: Any) -> None:
        """Reports one file: a line of text, and the same facts for JSON."""
        if facts:
            self._found.append(facts)
        if not self.as_json:
            say(line)

    def note(self, text: str, indent: str = "") -> None:
        """Adds a note about the file reported last."""
        if self.as_json:
            self._found[-1].setdefault("notes", []).append(text)
        else:
            say(f"{indent}note: {text}")

    def table(
        self, heads: Sequence[str], rows: Sequence[Sequence[str]], facts: Sequence[dict[str, Any]]
    ) -> None:
        """Reports several files as a table, and the same facts for JSON."""
        self._found += facts
        if not self.as_json:
            print_table(heads, rows)

    def end(self, status: int) -> int:
        """Prints the JSON object if requested; returns the exit status."""
        if self.as_json:
            print(dumps({"ok": status == 0, "checkpoints": strict(self._found)}, indent=2))
        return status
