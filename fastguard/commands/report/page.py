"""Renders the page around the plots: one self-contained HTML file, for desktop and phone.

The plotting library and the figure are embedded in compressed form. A Content-Security-Policy
forbids all requests, so the file cannot fetch anything. `page.html` is the template; jinja2 escapes
every text that this module passes to it.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastguard import __version__
from fastguard.commands.report.about import about
from fastguard.commands.report.evidence import tag_text
from fastguard.commands.report.figure import draw
from fastguard.commands.report.incidents import Row
from fastguard.commands.report.packing import pack
from fastguard.commands.report.style import ACTIONS
from fastguard.commands.report.summary import REACH, Jump, Summary
from fastguard.commands.report.verdict import Verdict
from fastguard.errors import describe_culprits, plural
from fastguard.errors.plain_text import printable

PLOT_ID = "plot"
_FOLDER = Path(__file__).parent


def _printable(value: Any) -> Any:
    return printable(value) if type(value) is str else value  # jinja2's Markup is a subclass of str


_TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    finalize=_printable,
    trim_blocks=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True, slots=True)
class _TableRow:
    """A row of the incident table, in plain text.

    Attributes:
        record: Index of the first record in the run; the table is sorted by it.
        first, last: The steps that the plots show when the row is selected.
        action: The CSS class of `done`.
    """

    record: int
    anchor: str
    first: int
    last: int
    steps: str
    what: str
    where: str = ""
    done: str = ""
    action: str = ""
    tag: str = ""


def render(name: str, summary: Summary, verdict: Verdict) -> str:
    """Renders the page of a run.

    Args:
        name: Name of the run.
        summary: The records, summarized.
        verdict: The verdict.

    Returns:
        The HTML file as text.
    """
    return _TEMPLATES.get_template("page.html").render(
        name=name,
        style=_file("page.css"),
        script=_file("unpack.js") + _file("page.js"),
        tone=_tone(summary),
        verdict=verdict,
        facts=_facts(summary),
        about=about(summary),
        guards=() if summary.header is None else summary.header.guards,
        has_clock=summary.clock is not None,
        plot=_plot(draw(summary)),
        rows=_rows(summary),
        notes=_notes(summary),
        version=__version__,
    )


def _file(name: str) -> Markup:
    return Markup((_FOLDER / name).read_text("utf-8"))


def _tone(summary: Summary) -> str:
    if not summary.survived:
        return "bad"
    return "warned" if summary.table.incidents else "fine"


def _facts(summary: Summary) -> str:
    if not summary.records:
        return ""
    actions = ", ".join(f"{n:,} {action}" for action, n in summary.actions.items())
    return f"Steps {summary.first_step:,} to {summary.last_step:,}: {actions}."


def _plot(figure: go.Figure) -> Markup:
    """The figure as JSON and the library, both packed; the page's script unpacks and draws them."""
    if not figure.data:
        return Markup()
    config = {
        "responsive": True,
        "displaylogo": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "resetScale2d"],
        "doubleClick": False,  # the page's script handles a double click and shows the whole run
    }
    drawn = json.loads(str(plotly.io.to_json(figure, validate=False)))
    data = json.dumps({"data": drawn["data"], "layout": drawn["layout"], "config": config})
    return Markup(f'<div id="{PLOT_ID}"></div>\n') + _packed("figure", data.encode()) + _library()


@functools.cache
def _library() -> Markup:
    """plotly.js. The page names its license."""
    return _packed("library", plotly.offline.get_plotlyjs().encode())


def _packed(name: str, data: bytes) -> Markup:
    return Markup('<script type="text/plain" id="{}" data-size="{}">{}</script>\n').format(
        name, len(data), Markup(pack(data))
    )


def _rows(summary: Summary) -> list[_TableRow]:
    incidents = [_incident(row, i) for i, row in enumerate(summary.table.rows, 1)]
    jumps = [_jump(jump, i) for i, jump in enumerate(summary.jumps, 1)]
    return sorted([*incidents, *jumps], key=lambda row: row.record)


def _incident(row: Row, number: int) -> _TableRow:
    steps = f"{row.first_step:,}"
    if row.last_step > row.first_step:
        steps += f"–{row.last_step:,}"
    what = _counted(row.reasons)
    if row.incidents > 1:
        what = f"{plural(row.incidents, 'incident')}, {plural(row.steps, 'step')}: {what}"
    elif row.steps > 1:
        what = f"{plural(row.steps, 'step')} in a row: {what}"
    action = row.actions.most_common(1)[0][0]
    return _TableRow(
        row.begin,
        f"incident-{number}",
        row.first_step,
        row.last_step,
        steps,
        what,
        where=_where(row),
        done=_counted(row.actions),
        action=action if action in ACTIONS else "applied",
        tag="" if row.first.tag is None else tag_text(row.first.tag),
    )


def _jump(jump: Jump, number: int) -> _TableRow:
    steps = f"{jump.from_step:,}→{jump.to_step:,}"
    low, high = sorted((jump.from_step, jump.to_step))
    what = "the step number went back"
    return _TableRow(jump.record, f"jump-{number}", low, high, steps, what)


def _where(row: Row) -> str:
    """The losses, parameters or signals of a row's first step."""
    first = row.first
    places = []
    if first.bad_losses:
        names = "" if first.bad_losses == ("loss",) else f" {', '.join(first.bad_losses)}"
        places.append(f"loss{names}")
    if first.culprits:
        places.append(describe_culprits(first.culprits[:2], first.n_culprits))
    if first.culprit_rank is not None:
        places.append(f"on rank {first.culprit_rank}")
    elif first.culprit_ranks:
        places.append(f"on {first.culprit_ranks} ranks")
    places.extend(first.drifts)
    if first.spikes:
        places.append(", ".join(first.spikes))
        if "grad_norm" in first.spikes:
            places[-1] += f" {first.norm:.4g}"
    return "; ".join(places)


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} {n:,}×" for name, n in counts.most_common())


def _notes(summary: Summary) -> list[str]:
    notes = []
    width = 2**summary.shift
    if width > 1:
        notes.append(
            f"The run is drawn in buckets of {width:,} steps: the pale line connects the minimum "
            "and maximum of each bucket, at the steps where they occurred; the solid line is the "
            f"mean of its good steps. {REACH} steps before and after an incident are drawn "
            "individually."
        )
    if any(row.incidents > 1 for row in summary.table.rows):
        notes.append(
            f"There were {summary.table.incidents:,} incidents; nearby incidents share a row of "
            "the table. The marks in the plots count all incidents."
        )
    if summary.n_jumps > len(summary.jumps):
        notes.append(
            f"The step number went back {summary.n_jumps:,} times; the first "
            f"{len(summary.jumps):,} are shown."
        )
    if summary.layers.names:
        notes.append(
            "Each record lists at most eight parameters, so the heat map may be incomplete."
        )
    if summary.watched.norms.layers:
        notes.append(
            "Gradient norm by layer, relative to the layer's median: red is larger (full red: 100 "
            "times), blue is smaller."
        )
    if summary.watched.ratios.layers:
        notes.append(
            "Update / weight by layer: red is above 1e-3 (full red: 0.1), blue is below 1e-3."
        )
    if summary.unnamed_losses:
        notes.append(
            "The run has more losses or thresholds than are drawn; the plots show only the first "
            "32."
        )
    return notes
