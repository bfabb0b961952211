"""demo.py in Chromium, clicked through: for its tests, and for README's screenshots.

python -m tests.browser RUN    draws, mixes and paints with a run, and writes figures/demo-draw.png and the other two
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
# As root, and asking nobody for anything
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
)
DRAW, MIX, PAINT = "Draw the images", "Mix the two images", "Make what is painted over anew"


@contextmanager
def served(printed: Path, *flags: object) -> Iterator[str]:
    """demo.py in a process of its own, that prints to a file: yields the page's address, and at last presses Ctrl-C."""
    command = [sys.executable, ROOT / "demo.py", "--device", "cpu", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(printed, "w") as file:
        # Ctrl-C, also of tests in the background
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=file, stderr=file, preexec_fn=heard
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search("the page is at (.*); ", printed.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, printed.read_text()


@contextmanager
def browser() -> Iterator[Page]:
    """A page of headless Chromium, whose waits end after three minutes."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = chromium.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(180_000)
        yield page
        chromium.close()


def control(page: Page, name: str) -> Locator:
    """The visible input of this name; of a slider its number."""
    label = page.get_by_label(re.compile(f"^(number input for )?{name}$"))
    return label.and_(page.locator("input")).locator("visible=true")


def fill(page: Page, **values: object) -> None:
    """Give the visible controls of these names a value, such as Seed=3."""
    for name, value in values.items():
        control(page, name.replace("_", " ")).fill(str(value))
        page.keyboard.press("Tab")


def click(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).locator("visible=true").first.click()


def upload(page: Page, path: Path) -> None:
    """To the first of the visible buttons for image files."""
    with page.expect_file_chooser() as chooser:
        click(page, "Upload an image")
    chooser.value.set_files(path)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def picture(page: Page, label: str | re.Pattern) -> np.ndarray:
    """Wait for a picture under this label, press its button for downloads, and return its pixels."""
    block = page.locator(
        ".block", has=page.get_by_test_id("block-label").filter(has_text=label)
    ).locator("visible=true")
    with page.expect_download() as download:
        block.get_by_test_id("download-link").click()
    return np.asarray(Image.open(download.value.path()))


def paint(page: Page) -> None:
    """Draw a broad line across the middle of the image in the tab Paint, when it is there."""
    page.get_by_text("select the draw tool to start").wait_for(state="hidden")
    page.wait_for_timeout(1000)  # until the canvas has it
    box = page.locator("canvas").locator("visible=true").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 120, y)
    page.mouse.down()
    page.mouse.move(x + 120, y, steps=20)
    page.mouse.up()
    page.wait_for_timeout(1000)


def sentence(page: Page, text: str) -> None:
    """Wait for an error of this text in the page."""
    page.get_by_test_id("toast-body").filter(has_text=text).first.wait_for()


def main() -> None:
    shot = lambda name: page.screenshot(path=ROOT / "figures" / f"demo-{name}.png", full_page=True)
    with (
        TemporaryDirectory() as folder,
        served(Path(folder, "printed"), *sys.argv[1:]) as address,
        browser() as page,
    ):
        page.goto(address)
        click(page, DRAW)
        picture(page, "sample.py")
        shot("draw")
        tab(page, "Mix")
        fill(page, Depth=0.6)
        click(page, MIX)
        picture(page, "The mixture")
        shot("mix")
        tab(page, "Paint")
        click(page, "Take the image of this number")
        paint(page)
        click(page, PAINT)
        picture(page, "The image, what is kept of it, and the answers")
        shot("paint")


if __name__ == "__main__":
    main()
