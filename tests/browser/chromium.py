"""A real browser: Chromium, as Debian has it, without a window."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-color-profile=srgb"),
)


class Browser:
    """A browser with a new, empty profile, while the ``with`` block runs.

    Args:
        width: Of the page, pixels.
        height: Likewise.
    """

    def __init__(self, width: int = 1500, height: int = 1000) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={self._profile.name}"):
            options.add_argument(flag)
        options.add_argument(f"--window-size={width},{height}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.driver.quit()
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Go to a page."""
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a function body in JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list[WebElement]:
        """Return the elements that a CSS selector names."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self) -> str:
        """Return what a person reads on the page."""
        return str(self.run("return document.body.innerText"))

    def wait(self, ready: Callable[[], Any], seconds: float, what: str) -> Any:
        """Wait until a function returns something, and return that.

        Raises:
            TimeoutError: It did not.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = ready()
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError(
            f"After {seconds:g} s there was no {what}. The page: {self.text()[:2000]}"
        )

    def pause(self, seconds: float) -> None:
        """Let the page go on: for pictures, which no element announces as complete."""
        time.sleep(seconds)

    def console_errors(self) -> list[str]:
        """Return the errors that the page logged since the last call."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
        ]

    def cpu_seconds(self) -> float:
        """Return the processor time of the browser's processes so far."""
        parents, spent = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # one that has just ended
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                spent[int(folder.name)] = int(fields[11]) + int(fields[12])
        found = {self.driver.service.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sum(spent.get(pid, 0) for pid in found) / os.sysconf("SC_CLK_TCK")

    def picture(self, element: WebElement | None = None) -> Image.Image:
        """Return what the page, or an element of it, looks like."""
        if element is None:
            data = self.driver.get_screenshot_as_png()
        else:
            self.run("arguments[0].scrollIntoView({block: 'center'})", element)
            data = element.screenshot_as_png
        return Image.open(io.BytesIO(data)).convert("RGB")


def drawn_share(picture: Image.Image) -> float:
    """Return the part of the pixels that are not of the commonest colour, which is the ground."""
    colours = picture.getcolors(maxcolors=picture.width * picture.height)
    return 1 - max(count for count, _ in colours) / (picture.width * picture.height)


def n_hues(picture: Image.Image) -> int:
    """Return in how many of twelve hues a picture has at least 20 pixels that are not grey."""
    hue, saturation, value = picture.convert("HSV").split()
    counts = [0] * 12
    pixels = zip(hue.tobytes(), saturation.tobytes(), value.tobytes(), strict=True)
    for h, s, v in pixels:
        if s > 80 and v > 40:
            counts[h * 12 // 256] += 1
    return sum(count >= 20 for count in counts)
