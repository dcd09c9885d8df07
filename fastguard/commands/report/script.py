"""What the page looks like (CSS) and what it does (JavaScript, without a library beside Plotly)."""

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --quiet: #60646c; --line: #d9d9e0;
  --back: #ffffff; --fine: #18794e; --warned: #ad5700; --bad: #ce2c31; --link: #0d74ce; }
@media (prefers-color-scheme: dark) {
  :root { --text: #edeef0; --quiet: #b0b4ba; --line: #363a3f; --back: #111113; --fine: #3dd68c;
    --warned: #ffa057; --bad: #ff9592; --link: #70b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1200px; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 8px; font-size: 1.5rem; line-height: 1.25; }
h1.fine { color: var(--fine); } h1.warned { color: var(--warned); } h1.bad { color: var(--bad); }
h2 { margin: 24px 0 4px; font-size: 1.15rem; }
header p { margin: 4px 0; } ul { margin: 8px 0; padding-left: 20px; }
a { color: var(--link); } .quiet, footer { color: var(--quiet); font-size: .9rem; }
button { font: inherit; padding: 4px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: none; color: var(--link); cursor: pointer; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: 6px 8px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th, td:first-child, td:nth-child(4) { white-space: nowrap; }
tr.chosen { background: rgba(128, 128, 128, .18); }
.skipped { color: var(--bad); } .sanitized { color: var(--warned); }
.clipped { color: var(--link); }
@media (max-width: 640px) {
  h1 { font-size: 1.25rem; } body { padding: 12px; }
  thead { display: none; } tr { display: block; padding: 8px 0;
    border-bottom: 1px solid var(--line); }
  td { display: block; padding: 1px 4px; border: 0; } td:first-child a { display: inline-block;
    padding: 6px 0; font-weight: 600; } td:empty { display: none; }
  td:not(:first-child)::before { content: attr(data-name) ": "; color: var(--quiet); } }
"""

SCRIPT = """
"use strict";
(() => {
  const plot = document.getElementById("plot");
  if (!plot) return;
  const meta = plot.layout.meta;
  const whole = plot.layout.xaxis.range.slice();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");

  function paint() {
    const color = getComputedStyle(document.body).color;
    Plotly.relayout(plot, { "font.color": color, "hoverlabel.font.color": "#ffffff" });
  }

  function axes(letter) {
    return Object.keys(plot.layout).filter((key) => key.startsWith(letter + "axis"));
  }

  function show(range, shapes) {
    const change = { shapes: shapes };
    for (const axis of axes("x")) change[axis + ".range"] = range.slice();
    return Plotly.relayout(plot, change);
  }

  // Whole names beside the plots would leave a phone no room for them.
  function fit() {
    const change = {};
    for (const axis of axes("y")) change[axis + ".tickfont.size"] = narrow.matches ? 10 : 12;
    for (const [axis, names] of Object.entries(meta.names))
      change[axis + ".ticktext"] = narrow.matches ? names.short : names.long;
    return Plotly.relayout(plot, change);
  }

  // From afar the means are the picture, close by the steps themselves.
  let close = false;
  function focus() {
    const range = plot.layout.xaxis.range;
    if ((range[1] - range[0] < 16 * meta.bucket) === close) return;
    close = !close;
    for (const [kind, far, near] of [["extremes", 0.4, 1], ["mean", 1, 0.3]]) {
      const lines = plot.data.flatMap((trace, i) => (trace.meta === kind ? [i] : []));
      if (lines.length) Plotly.restyle(plot, { opacity: close ? near : far }, lines);
    }
  }

  function choose(link) {
    const first = Number(link.dataset.first), last = Number(link.dataset.last);
    const pad = Math.max(16, last - first);
    document.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
    link.closest("tr").classList.add("chosen");
    show([first - pad, last + pad], [{
      type: "rect", xref: "x", yref: "paper", x0: first - 0.5, x1: last + 0.5, y0: 0, y1: 1,
      fillcolor: "rgba(229, 72, 77, 0.2)", line: { width: 1, color: "rgba(229, 72, 77, 0.7)" },
      layer: "below",
    }]);
    plot.scrollIntoView({ block: "start" });
  }

  document.querySelectorAll("a[data-first]").forEach((link) => {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      history.replaceState(null, "", link.getAttribute("href"));
      choose(link);
    });
  });
  document.getElementById("whole")?.addEventListener("click", () => {
    document.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
    show(whole, []);
    plot.scrollIntoView({ block: "start" });
  });
  // Where fingers scroll, a finger on a plot must scroll the page too.
  if (matchMedia("(pointer: coarse)").matches) Plotly.relayout(plot, { dragmode: false });
  dark.addEventListener("change", paint);
  narrow.addEventListener("change", fit);
  plot.on("plotly_relayout", focus);
  paint();
  fit();
  const asked = location.hash && document.querySelector(`a[href="${CSS.escape(location.hash)}"]`);
  if (asked) choose(asked);
})();
"""
