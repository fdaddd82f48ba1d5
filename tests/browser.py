"""A real browser for the tests of the pages: Debian's chromium without a window, and what it complains of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

REQUIRED = "ELC_FX_BROWSER_REQUIRED"  # set by .ci/run: where it is, a missing browser is a failure
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-sync",
)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A driver of a browser with a new profile. Skips the test where no chromium is installed, and may be missing."""
    found = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in found:
        reason = "needs chromium and its driver: apt-get install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get(REQUIRED) else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]  # type: ignore[assignment]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Any, page: Path, *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
    """Opens a page afresh, in a window of this size."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get("about:blank")
    driver.get(page.as_uri())


def complaints(driver: Any) -> list[str]:
    """What the page wrote to the console, errors of scripts among it."""
    return [entry["message"] for entry in driver.get_log("browser")]
