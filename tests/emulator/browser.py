"""A headless Chromium that is installed on this machine, and its pages."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from tools.emulator import Emulator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
PATIENCE_MILLISECONDS = 60_000.0
DESKTOP = (1360, 860)
NETWORK_CHANGED = "ERR_NETWORK_CHANGED"
"""Chromium gives up connecting, also to loopback, when any interface comes or goes, as beside tests of containers."""
LOADS = 10
LIVE = '#live[data-state="live"]'

Open = Callable[..., Page]


def installed() -> str:
    """Its path; without one the test is skipped, which is a failure on CI."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    found = found or next((path for path in APPLICATIONS if Path(path).exists()), None)
    if found is None:
        pytest.skip("no Chromium is installed, and the emulator's page is tested in one")
    return found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One for a module, whose tests must all be plain functions: this holds the thread's event loop."""
    path = installed()
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # for which Chromium has no sandbox
    with sync_playwright() as playwright:
        arguments = [
            "--disable-dev-shm-usage",
            *(["--no-sandbox"] if is_root else []),
        ]  # containers have little /dev/shm
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def load(page: Page, address: str, shows: str) -> None:
    """Until the page shows this; loaded anew when the network changed before."""
    changes: list[str] = []

    def note(text: str) -> None:
        if NETWORK_CHANGED in text:
            changes.append(text)

    page.on("console", lambda message: note(message.text))
    deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
    for _ in range(LOADS):
        changes.clear()
        try:
            page.goto("about:blank")  # an address that differs in nothing but its fragment would not be loaded anew
            page.goto(address)
        except Error as error:
            note(str(error))
            if not changes:
                raise
        while not changes:
            if page.locator(shows).is_visible():
                return
            assert time.monotonic() < deadline, f"{address} does not show {shows}"
            page.wait_for_timeout(20)
    pytest.fail(f"the network changed during each of {LOADS} loads")


@pytest.fixture
def open_page(chromium: Browser, emulator: Emulator) -> Iterator[Open]:
    """`open_page("/sessions/sesn_1", scheme="dark", size=(390, 800))`: a page that is live.

    Whatever it complains of on its console fails the test.
    """
    complaints: list[str] = []
    pages: list[Page] = []

    def open_(path: str = "/sessions", scheme: str = "light", size: tuple[int, int] = DESKTOP) -> Page:
        width, height = size
        page = chromium.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page.set_default_timeout(PATIENCE_MILLISECONDS)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        pages.append(page)
        load(page, f"{emulator.url}/#{path}", LIVE)
        return page

    yield open_
    for page in pages:
        page.close()
    complaints[:] = [text for text in complaints if NETWORK_CHANGED not in text]
    if complaints:
        pytest.fail(f"the page complained: {complaints}")
