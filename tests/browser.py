"""demo.py in Chromium, clicked through."""

import os
import re
import runpy
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, sync_playwright

from tests.conftest import ROOT
from tests.forked import Program, wait_until

UNPAINTED = "choose an image and paint over a part of it"


def demo_script() -> None:
    runpy.run_path(str(ROOT / "demo.py"), run_name="__main__")


@contextmanager
def served(printed: Path, *flags: object, act: Callable[[], None] = demo_script) -> Iterator[str]:
    """Run demo.py in a process of its own, printing to a file; yield the page's address.

    At the end it is stopped as Ctrl-C stops it, and its exit status is checked.
    """
    program = Program(printed, *flags, "--device cpu", act=act)
    try:
        wait_until(lambda: "URL: " in program.printed, program.is_alive)
        yield re.search("URL: *(.*)", program.printed)[1] + "/"
    finally:
        os.kill(program.pid, signal.SIGINT)
        assert program.wait() == 130, program.printed


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """Yield headless Chromium for pages whose waits end after a minute."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        context = chromium.new_context(viewport={"width": 1100, "height": 900})
        context.set_default_timeout(60_000)
        yield context
        chromium.close()


def fill(page: Page, **values: object) -> None:
    """Give the visible controls of these names a value, such as Seed=3; of sliders, the number.

    A tab that has just opened may give its controls their defaults once more, some milliseconds
    later, so this is repeated until the values stay.
    """
    fields = {}
    for name, value in values.items():
        label = re.compile(f"^(number input for )?{name.replace('_', ' ')}$")
        inputs = page.get_by_label(label).and_(page.locator("input"))
        fields[inputs.locator("visible=true")] = str(value)
    for _ in range(10):
        for field, value in fields.items():
            field.fill(value)
            page.keyboard.press("Tab")
        page.wait_for_timeout(100)
        if all(field.input_value() == value for field, value in fields.items()):
            return
    raise AssertionError(f"the page does not keep {values}")


def submit(page: Page) -> None:
    """Click the button of the open tab."""
    page.get_by_role("button", name="Submit").locator("visible=true").click()


def tab(page: Page, name: str) -> None:
    """Open the tab of this name."""
    page.get_by_role("tab", name=name).click()


def download_link(page: Page) -> Locator:
    """Return the button that downloads the picture of the open tab."""
    return page.get_by_test_id("download-link").locator("visible=true")


def picture(page: Page) -> np.ndarray:
    """Wait for the first picture in the open tab, download it by its button, return its pixels."""
    with page.expect_download() as download:
        download_link(page).click()
    return np.asarray(Image.open(download.value.path()))


def inpaint(page: Page) -> np.ndarray:
    """Draw a broad line across the image in the tab Paint, inpaint it, and return the picture.

    There must be no earlier picture. Nothing in the page says when it has the image and the line,
    so they are drawn as long as the page answers with an error that nothing is painted over, as it
    does at first.
    """
    canvas = page.locator("canvas").locator("visible=true").first
    start, end = {"x": 150, "y": 250}, {"x": 350, "y": 250}
    error = page.get_by_test_id("toast-body").filter(has_text=UNPAINTED).first
    for _ in range(5):
        submit(page)
        download_link(page).or_(error).first.wait_for()
        if download_link(page).is_visible():
            break
        # It is closed, so that it can come anew. It vanishes by itself, too.
        page.get_by_test_id("toast-close").evaluate_all("all => all.forEach(one => one.click())")
        error.wait_for(state="hidden")
        canvas.drag_to(canvas, source_position=start, target_position=end)
        page.wait_for_timeout(1000)
    return picture(page)
