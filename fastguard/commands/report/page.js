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
