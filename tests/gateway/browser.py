"""The chat page in a real headless Chromium, as its user sees and handles it."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image, ImageChops
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

WIDE = (1120, 760)
NARROW = (500, 800)  # Chromium's windows are no narrower


@contextlib.contextmanager
def running_browser() -> Iterator[webdriver.Chrome]:
    """A browser; the test is skipped where none is installed."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "force-device-scale-factor=1"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.set_window_size(*WIDE)
        yield browser
    finally:
        browser.quit()


class ChatPage:
    """The open page."""

    def __init__(self, browser: webdriver.Chrome, gateway_url: str) -> None:
        self.browser = browser
        browser.get(gateway_url + "/chat")
        self.wait(lambda: self["model"].text != "")

    def __getitem__(self, element_id: str) -> WebElement:
        return self.browser.find_element(By.ID, element_id)

    def bubbles(self, kind: str) -> list[str]:
        """The texts of the conversation that are `user`'s, `assistant`'s or an `error`."""
        return [found.text for found in self.browser.find_elements(By.CSS_SELECTOR, f"#talk p.{kind}")]

    def fill(self, **values: object) -> None:
        """Write into fields, by id, in place of what they hold."""
        for element_id, value in values.items():
            self[element_id].clear()
            self[element_id].send_keys(str(value))

    def send(self, text: str) -> None:
        """Write a message and press Enter."""
        self["message"].send_keys(text + Keys.ENTER)

    def wait(self, condition: Callable[[], bool], within_s: float = 20.0) -> None:
        """Until it holds; fails with a description of the page when it never does."""
        deadline_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline_s, self.browser.find_element(By.TAG_NAME, "body").text
            time.sleep(0.02)

    def is_idle(self) -> bool:
        """Nothing runs: one may send, and there is nothing to stop."""
        return self["send"].is_enabled() and not self["stop"].is_enabled()

    def picture(self, element_id: str | None = None) -> Image.Image:
        """A screenshot of the window, or of one element."""
        png = self[element_id].screenshot_as_png if element_id else self.browser.get_screenshot_as_png()
        return Image.open(io.BytesIO(png)).convert("RGB")

    def complaints(self) -> list[str]:
        """What the browser's console says of faults in the page itself (refused requests are the server's word)."""
        lines = [line for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]
        return [line["message"] for line in lines if line["source"] != "network"]


def ink(picture: Image.Image) -> float:
    """The share of pixels that differ from the most frequent colour: 0 for an empty picture."""
    colours = picture.getcolors(picture.width * picture.height)
    assert colours is not None
    return 1 - max(count for count, _ in colours) / (picture.width * picture.height)


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int] | None:
    """The box (left, top, right, bottom) of what looks different in two pictures of a size; None: nothing."""
    assert before.size == after.size
    return ImageChops.difference(before, after).getbbox()
