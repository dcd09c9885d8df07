"""The page in a real browser: plots, links, no network requests, and phones."""

import math
import platform
import random
import re
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.cli import main
from guardtest import require
from guardtest.browser import chromium

require("plotly")

INCIDENTS = (400, 1200, 1201, 2500)
NASTY = "</script><script>alert('x')</script>"
START = 1_700_000_000  # 2023-11-14 22:13:20 UTC
LONG = "encoder.stages.11.blocks.23.attention.in_proj.base_layer.weight"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of 3,000 steps with three incidents and a rollback."""
    folder = tmp_path_factory.mktemp("run")
    with JsonLinesSink(folder / "records.jsonl", name="<i>gpt</i>") as sink:
        for i, step in enumerate([*range(1, 2001), *range(1801, 3001)]):
            bad = step in INCIDENTS
            sink(
                StepRecord(
                    step,
                    total_norm=1 + 0.5 * math.sin(step),
                    clip_coef=1.0,
                    action="skipped" if bad else "applied",
                    reason="nonfinite_grad" if bad else None,
                    culprits=((LONG, 1, 0, 0), ("<b>head</b>.bias", 1, 0, 0)) if bad else (),
                    n_culprits=2 if bad else 0,
                    losses={"loss": math.nan if bad else 2 / step, NASTY: 0.5},
                    thresholds={"grad_norm": 3.0},
                    lr=1e-3,
                    tag=(NASTY, "x" * 300) if bad else None,
                    time=START + 10 * i,
                )
            )
    assert main(["report", str(folder)]) == 0
    return folder / "records.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def opened(browser, page, width, height, lines=5):
    phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 640})
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(page.as_uri())
    drawn = "document.querySelectorAll('.scatterlayer .trace path').length"
    wait_until(browser, f"{drawn} > {lines}")
    return browser


def wait_until(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(f"return {condition}"))


def x_ranges(browser):
    return browser.execute_script(
        "const plot = document.getElementById('plot');"
        "return Object.entries(plot._fullLayout).filter(([key]) => /^xaxis[0-9]*$/.test(key))"
        ".map(([, axis]) => axis.range)"
    )


DESK, PHONE = (1280, 900), (375, 800)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_is_drawn_without_errors(size, browser, page):
    opened(browser, page, *size)
    titles = [t.text for t in browser.find_elements("css selector", ".annotation-text")]
    assert titles == [
        "Loss",
        "Gradient norm",
        "Clip coefficient",
        "Learning rate",
        "Incidents",
        "Non-finite gradients by layer",
    ]
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, ".cartesianlayer .subplot") == len(titles) + 4  # marks
    assert browser.execute_script(count, ".heatmaplayer image") == 1
    lines = browser.find_elements("css selector", ".scatterlayer .js-line")
    assert len(lines) >= 6
    assert all("NaN" not in line.get_attribute("d") for line in lines)
    assert (
        "3 incidents in 3,200 steps, all survived." in browser.find_element("tag name", "h1").text
    )
    assert browser.get_log("browser") == []
    fetched = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert browser.execute_script(fetched) == []


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_selecting_an_incident_zooms_in_and_back(size, browser, page):
    opened(browser, page, *size)
    whole = x_ranges(browser)
    assert all(low <= 1 and high >= 3000 for low, high in whole)
    link = browser.find_element("css selector", "a[href='#incident-2']")
    assert link.text == "1,200–1,201"
    link.click()
    wait_until(browser, "document.getElementById('plot')._fullLayout.xaxis.range[0] > 1000")
    assert all(low == 1200 - 16 and high == 1201 + 16 for low, high in x_ranges(browser))
    (mark,) = browser.find_elements("css selector", ".shapelayer path")
    assert mark.is_displayed()
    place = browser.find_element("id", "plot").rect["y"]
    assert place <= browser.execute_script("return scrollY") + 1  # the plot was scrolled into view
    assert link.find_element("xpath", "./ancestor::tr").get_attribute("class") == "chosen"

    browser.find_element("id", "whole").click()
    wait_until(browser, "document.getElementById('plot')._fullLayout.xaxis.range[1] > 2900")
    assert x_ranges(browser) == whole
    assert browser.find_elements("css selector", ".shapelayer path, tr.chosen") == []
    assert browser.get_log("browser") == []


def y_range(browser, axis):
    return browser.execute_script(
        f"return document.getElementById('plot')._fullLayout.{axis}.range"
    )


def traces(browser, meta, field):
    script = (
        "const plot = document.getElementById('plot');"
        "return plot.data.flatMap((t, i) => t.meta === arguments[0] ? [plot._fullData[i]] : [])"
        ".map((t) => t[arguments[1]] instanceof Object ? Array.from(t[arguments[1]])"
        " : t[arguments[1]])"
    )
    return browser.execute_script(script, meta, field)


def test_zooming_in_fits_the_values_and_shows_single_steps(browser, page):
    opened(browser, page, *DESK)
    whole = y_range(browser, "yaxis2")
    assert traces(browser, "detail", "visible") == [False]
    browser.find_element("css selector", "a[href='#incident-2']").click()
    wait_until(browser, "document.getElementById('plot')._fullLayout.xaxis.range[0] > 1000")
    assert y_range(browser, "yaxis")[1] < 0.7  # the losses in view are 0.5 and below 0.002
    assert traces(browser, "detail", "visible") == [True]
    assert set(traces(browser, "overview", "visible")) == {False}
    (cells,) = traces(browser, "detail", "x")
    assert [1199.5, 1201.5] == [x for x in cells if x is not None and 1190 < x < 1210][:2]
    browser.find_element("id", "whole").click()
    wait_until(browser, "document.getElementById('plot')._fullLayout.xaxis.range[1] > 2900")
    assert y_range(browser, "yaxis2") == whole
    assert traces(browser, "detail", "visible") == [False]


def test_incidents_are_marked_on_every_curve(browser, page):
    opened(browser, page, *DESK)
    assert traces(browser, "mark", "x") == [list(INCIDENTS)] * 4


def test_smoothing_draws_an_average_over_faint_values(browser, page):
    opened(browser, page, *DESK)
    before = traces(browser, "mean", "y")
    move = (
        "const slider = document.getElementById('smoothing'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(move, 0.9)
    faint = "document.getElementById('plot').data.filter((t) => t.meta === 'faint')"
    wait_until(browser, f"{faint}.length > 0 && {faint}.every((t) => t.visible)")
    norm = [max(y) - min(y) for y in traces(browser, "mean", "y")]
    assert any(new < 0.9 * (max(y) - min(y)) for new, y in zip(norm, before, strict=True))
    browser.execute_script(move, 0)
    wait_until(browser, f"{faint}.every((t) => !t.visible)")
    assert traces(browser, "mean", "y") == before
    assert browser.get_log("browser") == []


def chosen_axis(browser, kind):
    browser.execute_script(
        "const axis = document.getElementById('axis'); axis.value = arguments[0];"
        "axis.dispatchEvent(new Event('change'))",
        kind,
    )
    wanted = "date" if kind == "time" else "linear"
    wait_until(browser, f"document.getElementById('plot')._fullLayout.xaxis.type === '{wanted}'")


def seen(browser):
    """The ends of the x axis, as steps or as local time in milliseconds, read as UTC."""
    return browser.execute_script(
        "const axis = document.getElementById('plot')._fullLayout.xaxis;"
        "return axis.range.map((value) => axis.r2l(value))"
    )


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_the_axis_can_show_the_time(size, zone, browser, page):
    browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": zone})
    opened(browser, page, *size)
    whole, steps = x_ranges(browser), traces(browser, "mark", "x")
    chosen_axis(browser, "time")
    shift = 0 if zone == "UTC" else -5 * 3600
    first, last = [1000 * (START + shift + s) for s in (0, 10 * 3199)]
    low, high = seen(browser)
    span = last - first
    assert first - 0.03 * span < low < first and last < high < last + 0.03 * span
    # Step 1200 was taken once. Step 2500 was taken after the steps from 1801 on had been repeated.
    seconds = [10 * 399, 10 * 1199, 10 * 1200, 10 * 2699]
    marks = traces(browser, "mark", "x")
    assert marks == [[1000 * (START + s) for s in seconds]] * 4
    title = browser.execute_script(
        "return Object.values(document.getElementById('plot').layout)"
        ".map((axis) => axis?.title?.text).filter((text) => text)"
    )
    assert title == [f"time ({zone})"]
    title_top, ticks_bottom = browser.execute_script(
        "const texts = [...document.querySelectorAll('#plot text')];"
        "const title = texts.find((text) => text.textContent.startsWith('time ('));"
        "const ticks = [...document.querySelectorAll('#plot .xaxislayer-above text')];"
        "return [title.getBoundingClientRect().top,"
        " Math.max(...ticks.map((tick) => tick.getBoundingClientRect().bottom))];"
    )
    # The second line of the labels, with the day, is not covered.
    assert title_top >= ticks_bottom - 2
    browser.find_element("css selector", "a[href='#incident-2']").click()
    wait_until(browser, f"document.getElementById('plot').layout.xaxis.range[0] > {low + 1}")
    low, high = seen(browser)
    assert low == 1000 * (START + shift + 10 * (1199 - 16))
    assert high == 1000 * (START + shift + 10 * (1200 + 16))
    assert traces(browser, "detail", "visible") == [True]
    around = "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
    shape = browser.execute_script(around + "return [box.left, box.right]", ".shapelayer path")
    plot = browser.execute_script(around + "return [box.left, box.right]", ".nsewdrag")
    assert plot[0] < shape[0] < shape[1] < plot[1]
    chosen_axis(browser, "step")
    assert seen(browser) == pytest.approx([1200 - 16, 1201 + 16])
    browser.find_element("id", "whole").click()
    wait_until(browser, "document.getElementById('plot')._fullLayout.xaxis.range[1] > 2900")
    assert (x_ranges(browser), traces(browser, "mark", "x")) == (whole, steps)
    assert browser.get_log("browser") == []


def test_smoothed_lines_and_hovers_follow_the_axis(browser, page):
    browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "UTC"})
    opened(browser, page, *DESK)
    chosen_axis(browser, "time")
    browser.execute_script(
        "const slider = document.getElementById('smoothing'); slider.value = 0.9;"
        "slider.dispatchEvent(new Event('input'))"
    )
    faint = "document.getElementById('plot').data.filter((t) => t.meta === 'faint')"
    wait_until(browser, f"{faint}.length > 0 && {faint}.every((t) => t.visible)")
    assert traces(browser, "faint", "x") == traces(browser, "mean", "x")
    assert traces(browser, "mark", "hovertemplate")[0].startswith("step %{customdata:,} at %{x|")
    assert traces(browser, "mark", "customdata")[0] == list(INCIDENTS)
    chosen_axis(browser, "step")
    assert traces(browser, "faint", "x") == traces(browser, "mean", "x")
    assert max(traces(browser, "faint", "x")[0]) < 3004  # the middle of the last bucket
    assert traces(browser, "mark", "hovertemplate")[0].startswith("step %{x:,}")
    assert browser.get_log("browser") == []


def test_the_page_shows_the_versions_that_wrote_the_records(browser, page):
    opened(browser, page, *DESK)
    header = browser.find_element("tag name", "header").text
    assert "<i>gpt</i> · records.jsonl" in header
    assert "2023-11-14 22:13:20 to 2023-11-15 07:06:30 UTC, 8 h 53 min" in header
    assert f"fastguard {fastguard.__version__}, torch {torch.__version__}" in header
    assert platform.node() in header


def test_a_page_of_a_thousand_steps_with_all_plots_is_small(browser, tmp_path):
    rng = random.Random(0)
    layers = [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(24)]
    with JsonLinesSink(tmp_path / "records.jsonl") as sink:
        for step in range(1, 1001):
            bad = rng.random() < 0.02
            sink(
                StepRecord(
                    step,
                    total_norm=rng.lognormvariate(0, 1),
                    clip_coef=rng.random(),
                    action="skipped" if bad else "clipped",
                    reason="nonfinite_grad" if bad else None,
                    culprits=((rng.choice(layers), 1, 0, 0),) if bad else (),
                    n_culprits=int(bad),
                    losses={"loss": rng.random(), "aux": rng.random()},
                    thresholds={name: rng.random() for name in ("grad_norm", "loss", "aux")},
                    lr=rng.random(),
                    tag={"epoch": step // 100, "batch": step % 100},
                    time=START + step + rng.random(),
                    watch={
                        name: {layer: rng.lognormvariate(0, 1) for layer in layers}
                        for name in ("tensor_norms", "update_ratio")
                    },
                )
            )
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "records.html").stat().st_size < 1.5e6
    opened(browser, tmp_path / "records.html", *DESK)
    titles = [t.text for t in browser.find_elements("css selector", ".annotation-text")]
    assert len(titles) == 8
    assert browser.get_log("browser") == []


def test_a_link_to_an_incident_selects_it(browser, page):
    opened(browser, page, *DESK)
    browser.get("about:blank")
    browser.get(f"{page.as_uri()}#incident-3")
    wait_until(browser, "document.getElementById('plot')?._fullLayout?.xaxis.range[0] > 2400")
    assert browser.get_log("browser") == []


def test_the_page_fits_the_width_of_a_phone(browser, page):
    opened(browser, page, *PHONE)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width == PHONE[0]
    # Dragging on a plot scrolls the page instead of drawing a zoom box.
    assert browser.execute_script("return document.getElementById('plot').layout.dragmode") is False
    plot = browser.find_element("css selector", ".draglayer .nsewdrag").rect["width"]
    assert plot > 0.6 * PHONE[0]  # the names of the layers leave room for the plots


def test_names_are_shown_as_text(browser, page):
    opened(browser, page, *DESK)
    assert NASTY in browser.find_element("tag name", "table").text
    legend = browser.execute_script("return document.querySelector('.infolayer').textContent")
    assert "alert" in legend
    assert "<b>head</b>" in browser.find_element("tag name", "table").text


@pytest.mark.parametrize("theme, dark", [("light", False), ("dark", True)])
def test_the_plots_use_the_color_scheme(theme, dark, browser, page):
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    opened(browser, page, *DESK)
    title = browser.find_element("css selector", ".annotation-text")
    brightness = [int(c) for c in re.findall(r"\d+", title.value_of_css_property("fill"))[:3]]
    assert (min(brightness) > 200) if dark else (max(brightness) < 60)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_makes_no_requests(page):
    own = re.sub(r"<script.*?</script>", "", page.read_text("utf-8"), flags=re.S)
    assert not re.search(r"(src|href)=.?https?:|@import|url\(", own)
    assert "default-src 'none'" in own
    assert 'name="viewport" content="width=device-width' in own
    assert page.read_text("utf-8").count("Plotly, Inc.") >= 1


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_watched_layers_are_drawn_with_names(size, browser, tmp_path):
    with JsonLinesSink(tmp_path / "records.jsonl") as sink:
        for step in range(1, 401):
            grown = 1.2 ** max(0, step - 300)
            watch = {
                "tensor_norms": {f"{LONG}.{i}.w": 2.0 * (grown if i == 2 else 1) for i in range(4)},
                "update_ratio": {f"{LONG}.{i}.w": 1e-3 for i in range(4)},
            }
            losses = {"loss": 2 / step}
            sink(
                StepRecord(
                    step, 1.0, 1.0, "applied", losses=losses, lr=1e-3,
                    watch=watch if step % 10 == 1 else {},
                )
            )  # fmt: skip
    assert main(["report", str(tmp_path)]) == 0
    opened(browser, tmp_path / "records.html", *size, lines=2)
    maps = browser.execute_script(
        "return plot._fullData.filter((trace) => trace.meta === 'watched')"
        ".map((trace) => [trace.z.length, trace.x.length, trace.customdata[2][39]])"
    )
    assert [m[:2] for m in maps] == [[4, 41], [4, 41]]
    assert maps[0][2].startswith("…") and maps[0][2].endswith("weight.2: 3.21e+07")
    ticks = "plot.layout.yaxis5.ticktext[2].length"
    wait_until(browser, f"{ticks} === {24 if size is DESK else 15}")
    assert "grew first" in browser.find_element("tag name", "ul").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0]
