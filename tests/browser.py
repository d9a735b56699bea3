"""A real browser, Debian's Chromium, that opens the pages and reports what a reader would stumble over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")  # a phone and a laptop, in pixels
PROGRAMS = "chromium", "chromedriver"
AUDIT = Path(__file__).with_name("audit.js").read_text(encoding="utf-8")


@contextmanager
def started() -> Iterator[Browser]:
    """A browser for a block; without one the test is skipped."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[dev]'")
    browser, driver = map(shutil.which, PROGRAMS)
    if not browser or not driver:
        pytest.skip(f"no browser: install {' and '.join(PROGRAMS)} (Debian: apt install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []  # Chromium refuses root with one
    for argument in ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", *root]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    made.set_script_timeout(60)
    try:
        yield Browser(made)
    finally:
        made.quit()


class Browser:
    """One tab of a browser; ``driver`` is selenium's."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str | Path) -> None:
        """Load a page: a file or a URL."""
        self.driver.get("about:blank")  # or an address that differs only after # is not loaded again
        self.driver.get(address.as_uri() if isinstance(address, Path) else address)
        self.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")

    def run(self, script: str) -> Any:
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(script)

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.driver.execute_async_script(
            f"const done = arguments[0];(function look() {{ if ({condition}) done(); else setTimeout(look, 10); }})();"
        )

    def show(self, width: int, scheme: str) -> None:
        """Give the page a width in pixels, and a light or dark screen."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()));"
        )

    def problems(self) -> list[str]:
        """What is wrong with the page, on a phone and on a laptop, light and dark, and what its scripts complained of.

        It scrolls sideways, text is too small, too faint or cut off, a name is broken, or something has no label.
        """
        found = []
        for width in WIDTHS:
            for scheme in SCHEMES:
                self.show(width, scheme)
                found += [f"{width} px, {scheme}: {problem}" for problem in self.run(AUDIT)]
        return found + [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
