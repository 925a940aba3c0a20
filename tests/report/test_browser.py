"""Every report in a real browser: on a phone and on a desk, in the light and in the dark."""

import base64
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = "120"  # after which a browser that hangs is ended
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
PHONE, DESK = 390, 1280
LOADED = """
Promise.all([...document.images].map(image => image.decode())).then(() => ({
  width: innerWidth,
  needed: document.documentElement.scrollWidth,
  images: document.images.length,
  wide: [...document.querySelectorAll("p, h1, h2, dl, figure, footer")]
    .filter(part => part.scrollWidth > part.clientWidth + 1).length,
}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """A page as a browser showed it.

    Attributes:
        requests: addresses that were asked for.
        errors: lines of the console.
        found: what `LOADED` gives.
        screen: the whole page as an array (h, w, 3).
    """

    requests: list
    errors: list
    found: dict
    screen: np.ndarray


class Browser:
    """Chromium without a window, driven by the DevTools protocol over two pipes."""

    def __init__(self, profile: Path) -> None:
        answers, there = os.pipe()
        here, orders = os.pipe()
        # The browser reads from 3 and writes to 4, which a shell opens for it. The pipes have high
        # numbers, so that none of them is closed by that.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (here, there)]
        shell = ["bash", "-c", 'exec "${@:2}" 3<&"$0" 4>&"$1"', *map(str, theirs)]
        command = ["timeout", SECONDS, CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([*shell, *command], pass_fds=theirs, **quiet)
        for end in (here, there, *theirs):
            os.close(end)
        self.answers, self.orders = answers, orders
        self.number, self.rest, self.events = 0, b"", []

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.call("Browser.close")
        self.process.wait(timeout=30)
        os.close(self.orders)
        os.close(self.answers)

    def call(self, method: str, session: str | None = None, **params: object) -> dict:
        """The answer to an order; events that come before it are kept."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        own = order | ({"sessionId": session} if session else {})
        os.write(self.orders, json.dumps(own).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def wait(self, method: str) -> None:
        """Waits for an event."""
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise EOFError("the browser ended")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def visit(self, page: Path, width: int, scheme: str) -> Seen:
        """Shows a page at a width in pixels, in the colour scheme "light" or "dark"."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        own = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{part}.enable", own)
        size = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", own, **size)
        self.call("Emulation.setScrollbarsHidden", own, hidden=True)
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", own, features=wanted)
        self.events.clear()
        self.call("Page.navigate", own, url=page.as_uri())
        self.wait("Page.loadEventFired")
        how = dict(awaitPromise=True, returnByValue=True)
        found = self.call("Runtime.evaluate", own, expression=LOADED, **how)
        shot = self._screen(own)
        self.call("Target.closeTarget", targetId=target)
        console = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return Seen(
            requests=[x["request"]["url"] for x in self._of("Network.requestWillBeSent")],
            errors=[line for method in console for line in self._of(method)],
            found=found["result"].get("value", {}),
            screen=shot,
        )

    def _screen(self, session: str) -> np.ndarray:
        size = self.call("Page.getLayoutMetrics", session)["cssContentSize"]
        options = dict(captureBeyondViewport=True, clip={**size, "scale": 1})
        shot = self.call("Page.captureScreenshot", session, **options)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def _of(self, method: str) -> list:
        return [event["params"] for event in self.events if event["method"] == method]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; apt-get install chromium brings it")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("command", ["demo", "plan", "compress", "finetune", "paper"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_report_fits_its_screen_and_asks_for_nothing(browser, folders, command, width):
    page = folders[command] / "report.html"
    seen = {scheme: browser.visit(page, width, scheme) for scheme in ("light", "dark")}
    for scheme, own in seen.items():
        assert {url for url in own.requests if not url.startswith("data:")} == {page.as_uri()}
        assert own.errors == []
        assert own.found["width"] == width and own.found["needed"] <= width
        assert own.found["images"] > 0 and own.found["wide"] == 0
        assert own.screen.shape[1] == width
        if folder := os.environ.get("LOWRANK_JAX_SCREENSHOTS"):
            Image.fromarray(own.screen).save(Path(folder, f"{command}-{width}-{scheme}.png"))
    assert seen["light"].screen.mean() > 200 and seen["dark"].screen.mean() < 60


def test_what_a_page_asks_for_and_complains_of_is_noticed(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<body style="width: 2000px"><img src="none.png"><script>console.error("no")</script>'
    )
    seen = browser.visit(page, PHONE, "light")
    assert (tmp_path / "none.png").as_uri() in seen.requests
    assert len(seen.errors) >= 2
