"use strict";

// The plotting library is embedded compressed, at less than half its size.
async function load(packed) {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

(async () => {
  const plot = document.getElementById("plot");
  if (!plot) return;
  await load(document.getElementById("library").textContent);
  const { data, layout, config } = JSON.parse(document.getElementById("figure").textContent);
  await Plotly.newPlot(plot, data, layout, config);
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

  // Axes without an explicit range are fitted to the visible part of their lines.
  const fitted = axes("y").filter((axis) => plot._fullLayout[axis]?.autorange);

  function fitting(axis, range) {
    const log = plot.layout[axis].type === "log";
    const short = axis.replace("axis", "");
    let low = Infinity, high = -Infinity;
    for (const trace of plot._fullData) {
      if (trace.yaxis !== short || !trace.visible) continue;
      for (let i = 0; i < trace.x.length; i++) {
        const y = trace.y[i];
        if (trace.x[i] < range[0] || trace.x[i] > range[1] || y === null || !Number.isFinite(y)) continue;
        if (log && y <= 0) continue;
        low = Math.min(low, y);
        high = Math.max(high, y);
      }
    }
    if (low > high) return null;
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const pad = 0.12 * (high - low) || Math.abs(high) / 2 || 1;
    return [low - pad, high + pad];
  }

  function show(range, shapes) {
    const change = { shapes: shapes };
    for (const axis of axes("x")) change[axis + ".range"] = range.slice();
    for (const axis of fitted) {
      const close = shapes.length ? fitting(axis, range) : null;
      if (close) change[axis + ".range"] = close;
      else change[axis + ".autorange"] = true;
    }
    return Plotly.relayout(plot, change);
  }

  // On a phone, long names beside the plots would leave no room for the plots.
  function fit() {
    const change = {};
    for (const axis of axes("y")) change[axis + ".tickfont.size"] = narrow.matches ? 10 : 12;
    for (const [axis, names] of Object.entries(meta.names))
      change[axis + ".ticktext"] = narrow.matches ? names.short : names.long;
    return Plotly.relayout(plot, change);
  }

  // Zoomed out, the means are prominent; zoomed in, the individual steps are.
  let close = false, exact = false;
  function focus() {
    const range = plot.layout.xaxis.range;
    if ((range[1] - range[0] < 256) !== exact) {
      exact = !exact;
      for (const [kind, seen] of [["overview", !exact], ["detail", exact]]) {
        const cells = plot.data.flatMap((trace, i) => (trace.meta === kind ? [i] : []));
        if (cells.length) Plotly.restyle(plot, { visible: seen }, cells);
      }
    }
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

  // A bias-corrected exponential moving average; gaps stay gaps.
  function smoothed(values, weight) {
    let mean = 0, total = 0;
    return Array.from(values, (value) => {
      if (!Number.isFinite(value)) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  }

  const lines = plot._fullData.flatMap(({ meta, x, y, line, xaxis, yaxis, index }) =>
    meta === "steps" || meta === "mean" ? [{ index, x, y, line, xaxis, yaxis }] : []);
  let faint = null;
  async function smooth(weight) {
    if (faint === null) {
      faint = lines.map((_, i) => plot.data.length + i);
      await Plotly.addTraces(plot, lines.map(({ x, y, line, xaxis, yaxis }) => ({
        type: "scatter", mode: "lines", x, y, xaxis, yaxis, opacity: 0.25, meta: "faint",
        line: { color: line.color, width: 1 }, showlegend: false, hoverinfo: "skip",
      })));
    }
    const indices = lines.map((line) => line.index);
    await Plotly.restyle(plot, { y: lines.map(({ y }) => (weight ? smoothed(y, weight) : y)) }, indices);
    await Plotly.restyle(plot, { visible: weight > 0 }, faint);
  }
  document.getElementById("smoothing").addEventListener("input", (event) => smooth(Number(event.target.value)));

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
  // On a touch screen, dragging on a plot must scroll the page.
  if (matchMedia("(pointer: coarse)").matches) Plotly.relayout(plot, { dragmode: false });
  dark.addEventListener("change", paint);
  narrow.addEventListener("change", fit);
  plot.on("plotly_relayout", focus);
  focus();
  paint();
  fit();
  const asked = location.hash && document.querySelector(`a[href="${CSS.escape(location.hash)}"]`);
  if (asked) choose(asked);
})();
