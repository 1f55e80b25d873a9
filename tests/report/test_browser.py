"""The page in a browser: charts, slices, tables and downloads, at three widths, light and dark.

Needs the package playwright and a Chromium of the system, which `.ci/run` installs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_report import record, with_statistics
from test_volumes import SHAPE, volume_with_sides

from tapct.eval.results.json_file import Picture
from tapct.report import page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NUM_STEPS = 400
WIDTHS = (1400, 800, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; apt-get install chromium")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def loss_at(step: int) -> float:
    return 9.0 - step / 100 + math.sin(step * 1.7)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with an evaluation and one scan to move through."""
    run = tmp_path_factory.mktemp("browser") / "run"
    run.mkdir()
    rows = [record(step) | {"loss/total": loss_at(step)} for step in range(1, NUM_STEPS + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "command": "tapct train a,b",
        "manifest": {"accepted": 12345, "refused": {"not_ct": 2}},
    }
    (run / "run.json").write_text(json.dumps(facts))
    evaluation = replace(with_statistics(12), volumes=(Picture("s1", "s1_volume.npz", ""),))
    evaluation.write(run / "eval")
    volume_with_sides().write(run / "eval" / "s1_volume.npz")
    return page.write(run)


class Opened:
    """The page in a browser, with all that it asked for and complained about."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda one: self.complaints.append(f"{one.type}: {one.text}"))
        self.page.on("pageerror", lambda one: self.complaints.append(str(one)))
        self.page.on("request", lambda one: self.requests.append(one.url))
        self.page.goto(file.as_uri())

    def build_all(self) -> None:
        """Move through the page, so that all charts and slices are drawn."""
        for figure in self.page.locator("figure.chart, figure.viewer").all():
            figure.scroll_into_view_if_needed()
        self.page.wait_for_function(
            "[...document.querySelectorAll('figure.chart')].every(one => one.chart.plot) && "
            "[...document.querySelectorAll('figure.viewer')].every(one => one.dataset.ready)"
        )


@pytest.fixture(scope="module")
def wide(browser: Browser, report: Path) -> Iterator[Page]:
    """The page at 1400 pixels, used by several tests."""
    opened = Opened(browser, report, viewport={"width": 1400, "height": 900})
    opened.build_all()
    yield opened.page
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize(
    ("width", "scheme"), [(1400, "dark"), (800, "light"), (390, "dark"), (390, "light")]
)
def test_the_page_opens_without_complaints_requests_or_overflow(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.build_all()
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in opened.requests) == 1
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(one) for one in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness < 60) == (scheme == "dark")
    opened.context.close()


def test_without_scripts_the_numbers_and_the_reason_are_there(
    browser: Browser, report: Path
) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    words = opened.page.inner_text("body")
    assert "JavaScript is off" in words and "Total loss" in words and "12 / 12" in words
    opened.context.close()


def chart_of(wide: Page, title: str) -> Locator:
    found = wide.locator("figure.chart", has=wide.locator("figcaption", has_text=title)).first
    found.scroll_into_view_if_needed()
    return found


def shown_steps(chart: Locator) -> tuple[float, float]:
    low, high = chart.evaluate("one => [one.chart.plot.scales.x.min, one.chart.plot.scales.x.max]")
    return low, high


def test_a_drag_zooms_all_curves_and_escape_shows_the_whole_run(wide: Page) -> None:
    chart, other = chart_of(wide, "Total loss"), chart_of(wide, "Learning rate")
    assert shown_steps(chart) == (1, NUM_STEPS)
    chart.scroll_into_view_if_needed()
    box = chart.locator(".u-over").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    wide.mouse.move(box["x"] + 0.25 * box["width"], middle)
    wide.mouse.down()
    wide.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=4)
    wide.mouse.up()
    wide.wait_for_timeout(50)
    low, high = shown_steps(chart)
    assert low == pytest.approx(0.25 * NUM_STEPS, abs=5)
    assert high == pytest.approx(0.5 * NUM_STEPS, abs=5)
    assert shown_steps(other) == (low, high)
    chart.locator(".plot").press("Escape")
    wide.wait_for_timeout(50)
    assert shown_steps(chart) == shown_steps(other) == (1, NUM_STEPS)


def test_the_keyboard_moves_the_cursor_zooms_and_makes_the_axis_logarithmic(wide: Page) -> None:
    chart = chart_of(wide, "Total loss")
    plot = chart.locator(".plot")
    plot.press("Home")
    for _ in range(4):
        plot.press("ArrowRight")
    wide.wait_for_timeout(50)
    assert chart.locator(".at").inner_text() == "step 5"
    plot.press("+")
    wide.wait_for_timeout(50)
    low, high = shown_steps(chart)
    assert high - low < 0.6 * NUM_STEPS and low <= 5 <= high
    plot.press("Escape")
    plot.press("l")
    assert chart.evaluate("one => one.chart.plot.scales.y.distr") == 3
    plot.press("l")
    assert chart.evaluate("one => one.chart.plot.scales.y.distr") == 1


def test_the_smoothed_line_is_the_rolling_mean_and_the_legend_reads_it(wide: Page) -> None:
    chart = chart_of(wide, "Total loss")
    values = [float(f"{loss_at(step):.5g}") for step in range(1, NUM_STEPS + 1)]
    for position, percent in ((0, 0.0), (6, 10.0)):
        wide.locator("#smoothing").fill(str(position))
        half = int(NUM_STEPS * percent / 200)
        slow = []
        for i in range(NUM_STEPS):
            reach = min(i, half)
            slow.append(float(np.mean(values[i - reach : i + reach + 1])))
        front = chart.evaluate("one => one.chart.plot.data[one.chart.plot.data.length - 1]")
        np.testing.assert_allclose(front, slow, atol=1e-9)
        chart.locator(".plot").press("Home")
        chart.locator(".plot").press("ArrowRight")
        wide.wait_for_timeout(50)
        read = float(chart.locator(".val").inner_text())
        assert read == pytest.approx(slow[1], abs=1e-3)
    wide.locator("#smoothing").fill("4")


def pixel(canvas: Locator, u: float, v: float) -> list[int]:
    """Colour at a place of a canvas, from 0 to 1 along its width and height."""
    found: list[int] = canvas.evaluate(
        "(one, [u, v]) => [...one.getContext('2d').getImageData(Math.floor(u * one.width), "
        "Math.floor(v * one.height), 1, 1).data].slice(0, 3)",
        [u, v],
    )
    return found


def go_to(wide: Page, plane: str, slice_number: int) -> None:
    wide.locator(f"figure.viewer input[value={plane}]").check()
    wide.locator("figure.viewer .position").fill(str(slice_number))
    wide.wait_for_timeout(60)


def test_every_voxel_is_where_a_radiologist_looks_for_it(wide: Page) -> None:
    depth, height, width = SHAPE
    wide.locator("figure.viewer").scroll_into_view_if_needed()
    canvases = wide.locator("figure.viewer canvas")
    ct, features, truth = (canvases.nth(number) for number in range(3))
    z, y, x = 5, 8, 6  # in the liver, on the patient's right
    views = {
        "axial": (z, (x + 0.5) / width, (y + 0.5) / height),
        "coronal": (y, (x + 0.5) / width, (depth - 1 - z + 0.5) / depth),
        "sagittal": (x, (y + 0.5) / height, (depth - 1 - z + 0.5) / depth),
    }
    for plane, (at, u, v) in views.items():
        go_to(wide, plane, at)
        grey = pixel(ct, u, v)
        red, green, blue = pixel(truth, u, v)
        assert grey[0] == grey[1] == grey[2] > 150, plane
        assert red > green + 15 > blue + 15, f"{plane}: the liver is painted"
        if plane != "sagittal":
            assert u < 0.5, "the patient's right is on the left of the picture"
    go_to(wide, "axial", z)
    right, left = pixel(features, 0.2, 0.5), pixel(features, 0.8, 0.5)
    assert left[0] > right[0] + 100  # red grows to the patient's left
    assert pixel(features, 0.01, 0.5) == [0, 0, 0]  # outside the body


def test_the_slider_moves_all_panels_with_the_keyboard_too(wide: Page) -> None:
    go_to(wide, "axial", 5)
    slider = wide.locator("figure.viewer .position")
    canvases = wide.locator("figure.viewer canvas")
    before = [one.evaluate("one => one.toDataURL()") for one in canvases.all()]
    for _ in range(5):
        slider.press("ArrowRight")
    wide.wait_for_timeout(60)
    assert "slice 10 of 11, 30 mm" in wide.locator("figure.viewer .where").inner_text()
    after = [one.evaluate("one => one.toDataURL()") for one in canvases.all()]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_an_organ_is_hidden_by_its_name_and_the_left_one_of_a_pair_is_hatched(wide: Page) -> None:
    depth, height, width = SHAPE
    go_to(wide, "axial", 2)
    truth = wide.locator("figure.viewer canvas").nth(2)

    def colours(x: int) -> int:
        """Number of colours on a vertical line through the middle of an organ."""
        place = [(x + 0.5) / width, 13.0 / height, 1.0 / height]
        found: list[str] = truth.evaluate(
            "(one, [u, v, length]) => { const {data} = one.getContext('2d').getImageData("
            "u * one.width, v * one.height, 1, length * one.height); const found = []; "
            "for (let i = 0; i < data.length; i += 4) found.push(data.slice(i, i + 3).join()); "
            "return found; }",
            place,
        )
        return len(set(found))

    right, left = colours(6), colours(17)
    assert right < 6 < left  # one colour, and stripes over interpolated grey values
    at = (5.5 / width, 9.5 / height)
    painted = pixel(truth, *at)
    liver = wide.locator("figure.viewer .organ", has_text="liver")
    liver.click()
    wide.wait_for_timeout(60)
    assert liver.get_attribute("aria-pressed") == "false"
    red, green, blue = pixel(truth, *at)
    assert red == green == blue != painted
    liver.click()


def rows_of(table: Locator) -> list[list[str]]:
    """Cells of a table as they are shown, without the bars."""
    found: list[list[str]] = table.evaluate(
        "one => [...one.rows].map(row => [...row.cells].filter(cell => "
        "!cell.matches('.track, .track-head')).map(cell => cell.textContent.trim()))"
    )
    return found


def test_tables_sort_by_click_and_by_enter(wide: Page) -> None:
    table = wide.locator("table[data-csv=lung-depth-scans]")
    table.evaluate("one => { one.closest('details').open = true; }")
    names = [row[0] for row in rows_of(table)[1:]]
    assert names == sorted(names) and len(names) == 12
    value = table.locator("thead th").nth(1)
    value.locator("button").click()
    values = [float(row[1]) for row in rows_of(table)[1:]]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert value.get_attribute("aria-sort") == "descending"
    value.locator("button").press("Enter")
    assert [float(row[1]) for row in rows_of(table)[1:]] == sorted(values)
    table.locator("thead th").first.locator("button").press("Enter")
    assert [row[0] for row in rows_of(table)[1:]] == names
    assert value.get_attribute("aria-sort") is None


def test_every_table_is_downloaded_as_it_is_shown(wide: Page) -> None:
    wide.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    tables = wide.locator("table[data-csv]").all()
    assert len(tables) == 6
    for table in tables:
        name = table.get_attribute("data-csv")
        with wide.expect_download() as started:
            wide.get_by_role("button", name=f"download the table {name} as CSV").click()
        download = started.value
        assert download.suggested_filename == f"{name}.csv"
        content = Path(download.path()).read_text(encoding="utf-8-sig")
        plain = []
        for row in rows_of(table):
            cells = [cell.replace("\u2009", "").replace("\u2212", "-") for cell in row]
            plain.append([re.sub(r"\s+", " ", cell) for cell in cells])
        assert list(csv.reader(io.StringIO(content))) == plain, name


def test_a_page_that_is_written_again_loads_itself_again(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 5.0}\n')
    out = page.write(tmp_path, reload_s=0.2)
    opened = Opened(browser, out)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2222, "loss/total": 4.0}\n')
    page.write(tmp_path)
    opened.page.wait_for_selector("text=2222", timeout=5000)
    assert opened.page.locator("#reload").count() == 0
    opened.context.close()
