"""Local pages in headless Chromium, for tests of the HTML files that the toolkit writes.

`open_page` yields a page and what the browser complained about. A page of ours must not complain and must not reach
for anything but itself, so tests end with `assert_quiet`. Debian's `chromium` and the package `playwright` are used;
without them the test is skipped and says what is missing. Nothing is downloaded here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",  # containers run tests as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm is often 64 MB
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PATIENCE = 120_000  # milliseconds to wait for what must come: a busy machine is no failure


@contextmanager
def open_page(
    path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, fragment: str = ""
) -> Iterator[Opened]:
    """Open a local HTML file and yield it with what the browser reports while it is open.

    Args:
        path: the file.
        width, height: of the window, in CSS pixels; at most 600 wide, it is a telephone with a touch screen.
        dark: whether the reader prefers a dark page.
        fragment: what follows `#` in the address.
    """
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

    address = path.resolve().as_uri() + (f"#{fragment}" if fragment else "")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=ARGUMENTS)
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                has_touch=width <= 600,
                is_mobile=width <= 600,
                permissions=["clipboard-read", "clipboard-write"],
            )
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            opened = Opened(page)
            page.on("console", opened.listen)
            page.on("pageerror", lambda error: opened.errors.append(str(error)))
            page.on("dialog", opened.refuse)
            page.on("request", opened.note)
            page.goto(address)
            yield opened
        finally:
            browser.close()


@dataclass
class Opened:
    """A page (playwright's), and what it did that no page of ours does."""

    page: Any
    console: list[str] = field(default_factory=list)  # errors and warnings
    errors: list[str] = field(default_factory=list)  # uncaught exceptions
    dialogs: list[str] = field(default_factory=list)  # alert() and its kin
    requests: list[str] = field(default_factory=list)  # that are neither file: nor data:

    def listen(self, said: Any) -> None:
        """Keep an error or a warning of the console."""
        if said.type in ("error", "warning"):
            self.console.append(said.text)

    def note(self, request: Any) -> None:
        """Keep the address of a request that leaves the file."""
        if not request.url.startswith(("file:", "data:")):
            self.requests.append(request.url)

    def refuse(self, dialog: Any) -> None:
        """Keep the words of a dialog, and close it."""
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def assert_quiet(self) -> None:
        """Check that nothing went wrong, nothing was asked for, and nothing is wider than the window."""
        assert self.console == []
        assert self.errors == []
        assert self.dialogs == []
        assert self.requests == []
        widths = self.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert widths[0] <= widths[1], f"the page is {widths[0]} pixels wide in a window of {widths[1]}"
