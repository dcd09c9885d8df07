(async () => {
  const plot = document.getElementById("plot");
  if (!plot) return;
  await new Promise((done) => setTimeout(done));  // lets the browser show the text of the page first
  const script = document.createElement("script");
  script.textContent = unpacked(document.getElementById("library"));
  document.head.append(script);
  const { data, layout, config } = JSON.parse(unpacked(document.getElementById("figure")));
  await Plotly.newPlot(plot, data, layout, config);
  const meta = plot.layout.meta;
  const whole = plot.layout.xaxis.range.slice();
  const steps = plot._fullData.map((trace, i) => Array.from(trace.x ?? plot.data[i].x));  // the first: decoded, if visible
  const height = plot.layout.height, bottom = plot.layout.margin.b;
  let timed = false;  // whether the axis shows the time
  let marked = null;  // the chosen steps
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
      const at = steps[trace.index];
      for (let i = 0; i < at.length; i++) {
        const y = trace.y[i];
        if (at[i] < range[0] || at[i] > range[1] || y === null || !Number.isFinite(y)) continue;
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

  // The visible range of steps.
  function seen() {
    const axis = plot._fullLayout.xaxis;
    return axis.range.map((value) => stepAt(axis.r2l(value)));
  }

  function interpolated(value, from, to) {
    const last = from.length - 1;
    if (value <= from[0] || value >= from[last]) {  // beyond the ends: the mean speed
      const end = value <= from[0] ? 0 : last;
      return to[end] + (value - from[end]) * (to[last] - to[0]) / (from[last] - from[0] || 1);
    }
    let low = 0, high = last;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (from[middle] <= value) low = middle; else high = middle;
    }
    const share = (value - from[low]) / (from[high] - from[low] || 1);
    return to[low] + share * (to[high] - to[low]);
  }

  // Plotly shows milliseconds in the local time zone, and reads its axes as if that were UTC.
  function at(step) {
    if (!timed || step === null) return step;
    const { start, steps, seconds } = meta.clock;
    return 1000 * (start + interpolated(step, steps, seconds));
  }

  function stepAt(value) {
    if (!timed) return value;
    const { start, steps, seconds } = meta.clock;
    const milliseconds = value + new Date(value).getTimezoneOffset() * 60000;
    return interpolated(milliseconds / 1000 - start, seconds, steps);
  }

  function marks() {
    if (marked === null) return [];
    return [{
      type: "rect", xref: "x", yref: "paper", y0: 0, y1: 1, x0: at(marked[0] - 0.5), x1: at(marked[1] + 0.5),
      fillcolor: "rgba(229, 72, 77, 0.2)", line: { width: 1, color: "rgba(229, 72, 77, 0.7)" },
      layer: "below",
    }];
  }

  // "step 7" becomes "step 7 at 12:30:05"; a cell of a map has a time instead of a step.
  const CLOCK = "%b %-d %H:%M:%S";
  const hovers = plot._fullData.map((trace) => trace.hovertemplate);
  const own = plot._fullData.map((trace) => trace.customdata);
  function hover(i) {
    if (!timed || !hovers[i]) return hovers[i];
    return hovers[i].replace("%{x:,}", `%{customdata:,} at %{x|${CLOCK}}`)
      .replace("near step %{x:,.0f}", `near %{x|${CLOCK}}`).replace("%{x:,.0f}", `%{x|${CLOCK}}`);
  }

  async function useTime(wanted) {
    const range = seen();
    timed = wanted;
    // The labels of a date axis have a second line, for the day.
    const room = timed ? 18 : 0;
    const change = { shapes: marks(), height: height + room, "margin.b": bottom + room };
    for (const axis of axes("x")) {
      change[axis + ".title.standoff"] = 4;
      change[axis + ".tickangle"] = timed ? 0 : "auto";  // turned ones would cover the title
      change[axis + ".nticks"] = timed && narrow.matches ? 4 : 0;
      change[axis + ".type"] = timed ? "date" : "linear";
      change[axis + ".range"] = range.map(at);
      change[axis + ".tickformat"] = timed ? "" : ",";
      if (plot.layout[axis].title?.text) change[axis + ".title.text"] = timed
        ? `time (${Intl.DateTimeFormat().resolvedOptions().timeZone})` : "step";
    }
    const traces = steps.map((_, i) => i);
    await Plotly.update(plot, {
      x: steps.map((x) => x.map(at)),
      hovertemplate: traces.map(hover),
      customdata: traces.map((i) => own[i] ?? (timed ? steps[i] : null)),
    }, change, traces);
  }
  document.getElementById("axis")?.addEventListener("change", (event) => useTime(event.target.value === "time"));

  function show(range) {
    const change = { shapes: marks() };
    for (const axis of axes("x")) change[axis + ".range"] = range.map(at);
    for (const axis of fitted) {
      const close = marked ? fitting(axis, range) : null;
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
    const range = seen();
    if ((range[1] - range[0] < 256) !== exact) {
      exact = !exact;
      for (const [kind, visible] of [["overview", !exact], ["detail", exact]]) {
        const cells = plot.data.flatMap((trace, i) => (trace.meta === kind ? [i] : []));
        if (cells.length) Plotly.restyle(plot, { visible }, cells);
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
    marked = [first, last];
    show([first - pad, last + pad]);
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

  const lines = plot._fullData.flatMap(({ meta, y, line, xaxis, yaxis, index }) =>
    meta === "steps" || meta === "mean" ? [{ index, y, line, xaxis, yaxis }] : []);
  let faint = null;
  async function smooth(weight) {
    if (faint === null) {
      faint = lines.map((_, i) => plot.data.length + i);
      for (const { index } of lines) steps.push(steps[index]);
      await Plotly.addTraces(plot, lines.map(({ index, y, line, xaxis, yaxis }) => ({
        type: "scatter", mode: "lines", x: steps[index].map(at), y, xaxis, yaxis, opacity: 0.25, meta: "faint",
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
  function showWhole() {
    document.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
    marked = null;
    show(whole);
  }
  document.getElementById("whole")?.addEventListener("click", () => {
    showWhole();
    plot.scrollIntoView({ block: "start" });
  });
  plot.on("plotly_doubleclick", showWhole);
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
