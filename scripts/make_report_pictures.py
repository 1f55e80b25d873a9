"""Takes docs/pictures/report_*.webp, the pictures of docs/report.md, from reports in Chromium.

Give two reports: one of a run with long curves and an evaluation, and one of a run that was
evaluated on phantom scans, so that no picture shows a patient. Needs the package playwright and a
Chromium of the system.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

OUT = Path(__file__).resolve().parent.parent / "docs" / "pictures"
QUALITY = 82


def write(picture: Image.Image, width: int, name: str) -> None:
    """Write a picture at a width in pixels."""
    height = round(picture.height * width / picture.width)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.save(OUT / name, "WEBP", quality=QUALITY, method=6)


def slices(browser: Browser, report: Path) -> None:
    """A phantom scan, cut from left to right."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(report.resolve().as_uri())
    viewer = page.locator("figure.viewer").first
    viewer.scroll_into_view_if_needed()
    page.wait_for_selector("figure.viewer[data-ready]")
    viewer.locator("input[value=coronal]").check()
    page.wait_for_timeout(300)
    write(Image.open(io.BytesIO(viewer.screenshot())), 900, "report_slices.webp")


def curves(browser: Browser, report: Path) -> None:
    """The first four charts of the losses, with the cursor."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(report.resolve().as_uri())
    section = page.locator("section", has=page.locator("#losses"))
    section.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    plots = [chart.bounding_box() for chart in section.locator("figure.chart").all()[:4]]
    boxes, whole = [box for box in plots if box], section.bounding_box()
    assert whole is not None and boxes
    page.mouse.move(boxes[0]["x"] + 260, boxes[0]["y"] + 130)
    page.wait_for_timeout(200)
    picture = Image.open(io.BytesIO(section.screenshot()))
    end = max(box["y"] + box["height"] for box in boxes) - whole["y"]
    write(picture.crop((0, 0, picture.width, round(end) + 6)), 900, "report_curves.webp")


def narrow(browser: Browser, report: Path) -> None:
    """The tables of an evaluation on a telephone."""
    view = {"width": 390, "height": 640}
    page = browser.new_page(viewport=view, device_scale_factor=2)  # type: ignore[arg-type]
    page.goto(report.resolve().as_uri())
    page.evaluate("document.querySelector('#frozen-features').scrollIntoView()")
    page.wait_for_timeout(500)
    write(Image.open(io.BytesIO(page.screenshot())), 640, "report_narrow.webp")


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("report", type=Path, help="report.html of a run with an evaluation")
    parser.add_argument("phantom", type=Path, help="report.html of a run on phantom scans")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = shutil.which("chromium")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        curves(browser, options.report)
        narrow(browser, options.report)
        slices(browser, options.phantom)
        browser.close()


if __name__ == "__main__":
    main()
