"""The page around the plots: one HTML file that asks for nothing else, on a desk or on a phone.

The library of the plots is written into the file. A Content-Security-Policy forbids every request,
so that the file cannot fetch anything even if the library wanted to.
"""

from __future__ import annotations

import html
from collections import Counter
from string import Template

import plotly.graph_objects as go
import plotly.io

from fastguard import __version__
from fastguard.commands.report.close_up import REACH
from fastguard.commands.report.evidence import tag_text
from fastguard.commands.report.figure import ACTIONS, draw
from fastguard.commands.report.incidents import Row
from fastguard.commands.report.script import SCRIPT, STYLE
from fastguard.commands.report.summary import Jump, Summary
from fastguard.commands.report.verdict import Verdict, plural
from fastguard.errors import describe_culprits
from fastguard.errors.plain_text import printable

PLOT_ID = "plot"


def render(name: str, summary: Summary, verdict: Verdict) -> str:
    """The page of a run.

    Args:
        name: What the run is called.
        summary: What was read.
        verdict: What was found.

    Returns:
        The HTML file.
    """
    return _PAGE.substitute(
        name=_text(name),
        style=STYLE,
        script=SCRIPT,
        tone=_tone(summary),
        headline=_text(verdict.headline),
        findings="".join(f"<li>{_text(finding)}</li>" for finding in verdict.findings),
        facts=_facts(summary),
        plot=_plot(draw(summary)),
        table=_table(summary),
        notes=_notes(summary),
        version=__version__,
    )


def _text(text: str) -> str:
    """Text as HTML. Everything on the page that is not written in this package goes through here,
    or through the labels of `figure`."""
    return html.escape(printable(text))


def _tone(summary: Summary) -> str:
    if not summary.survived:
        return "bad"
    return "warned" if summary.table.incidents else "fine"


def _facts(summary: Summary) -> str:
    if not summary.records:
        return ""
    actions = ", ".join(f"{n:,} {_text(action)}" for action, n in summary.actions.items())
    return f"Steps {summary.first_step:,} to {summary.last_step:,}: {actions}."


def _plot(figure: go.Figure) -> str:
    if not figure.data:
        return ""
    return plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=True,
        div_id=PLOT_ID,
        config={
            "responsive": True,
            "displaylogo": False,
            "modeBarButtonsToRemove": ["select2d", "lasso2d"],
            "doubleClick": "reset",
        },
    )


def _table(summary: Summary) -> str:
    rows: list[tuple[int, str]] = [
        (row.begin, _incident(row, i)) for i, row in enumerate(summary.table.rows, 1)
    ]
    rows += [(jump.record, _jump(jump, i)) for i, jump in enumerate(summary.jumps, 1)]
    if not rows:
        return ""
    head = "".join(f"<th>{title}</th>" for title in ("Step", "What", "Where", "Done", "Tag"))
    body = "\n".join(row for _, row in sorted(rows))
    return (
        f'<h2>Incidents</h2><p class="quiet">Choose one to see it in the plots. '
        f'<button type="button" id="whole">Whole run</button></p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    )


def _incident(row: Row, number: int) -> str:
    steps = f"{row.first_step:,}"
    if row.last_step > row.first_step:
        steps += f"–{row.last_step:,}"
    what = _counted(row.reasons)
    if row.incidents > 1:
        what = f"{plural(row.incidents, 'incident')}, {plural(row.steps, 'step')}: {what}"
    elif row.steps > 1:
        what = f"{plural(row.steps, 'step')} in a row: {what}"
    tag = "" if row.first.tag is None else tag_text(row.first.tag)
    return _tr(
        _link(f"incident-{number}", row.first_step, row.last_step, steps),
        _text(what),
        _text(_where(row)),
        f'<span class="{_class(row)}">{_text(_counted(row.actions))}</span>',
        _text(tag),
    )


def _jump(jump: Jump, number: int) -> str:
    steps = f"{jump.from_step:,}→{jump.to_step:,}"
    low, high = sorted((jump.from_step, jump.to_step))
    return _tr(_link(f"jump-{number}", low, high, steps), "the step number went back", "", "", "")


def _where(row: Row) -> str:
    """Of its first step: the losses, the parameters, or the signals."""
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
    if first.spikes:
        places.append(", ".join(first.spikes))
        if "grad_norm" in first.spikes:
            places[-1] += f" {first.norm:.4g}"
    return "; ".join(places)


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} {n:,}×" for name, n in counts.most_common())


def _class(row: Row) -> str:
    action = row.actions.most_common(1)[0][0]
    return action if action in ACTIONS else "applied"


def _link(anchor: str, first: int, last: int, text: str) -> str:
    return f'<a href="#{anchor}" data-first="{first}" data-last="{last}">{text}</a>'


def _tr(*cells: str) -> str:
    names = ("Step", "What", "Where", "Done", "Tag")
    tds = "".join(
        f'<td data-name="{name}">{cell}</td>' for name, cell in zip(names, cells, strict=True)
    )
    return f"<tr>{tds}</tr>"


def _notes(summary: Summary) -> str:
    notes = []
    width = 2**summary.buckets.shift
    if width > 1:
        notes.append(
            f"The run is drawn in buckets of {width:,} steps: the pale line goes through the least "
            "and the greatest value of each, at the steps where they were; the full line is the "
            f"mean of its good steps. {REACH} steps before and after an incident are drawn one by "
            "one."
        )
    if any(row.incidents > 1 for row in summary.table.rows):
        notes.append(
            f"There were {summary.table.incidents:,} incidents: those close together share a row "
            "of the table. The marks in the plots count them all."
        )
    if summary.n_jumps > len(summary.jumps):
        notes.append(
            f"The step number went back {summary.n_jumps:,} times; the first "
            f"{len(summary.jumps):,} are shown."
        )
    if summary.layers.names:
        notes.append("A record names its first eight bad parameters; the heat map knows no more.")
    if summary.unnamed_losses:
        notes.append("There are more losses or thresholds than the first 32 that are drawn.")
    return "".join(f"<p>{note}</p>" for note in notes)


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<link rel="icon" href="data:,">
<title>$name · fastguard report</title>
<style>$style</style>
</head>
<body>
<header>
<p class="quiet">$name</p>
<h1 class="$tone">$headline</h1>
<ul>$findings</ul>
<p class="quiet">$facts</p>
</header>
<main>
$plot
$table
</main>
<footer>$notes<p>fastguard $version</p></footer>
<script>$script</script>
</body>
</html>
""")
