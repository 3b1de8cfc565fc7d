"""Headless Chromium, spoken to in its own protocol (Chrome DevTools Protocol) over a pair of pipes: JSON, ended by NUL."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import PATIENCE

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip

# It reads from 3 and writes to 4.
_MOVE = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


# Of every piece of text: its colour against the nearest background behind it, as WCAG 2.1 computes contrast.
CONTRAST = """
(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = numbers(colour).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim()) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(walker.currentNode.data);
  }
  return poor;
})()
"""
# What sticks out of the window, or out of its own card.
OVERFLOW = """
[...document.querySelectorAll('body *')].filter(node => {
  const box = node.getBoundingClientRect(), card = node.closest('figure, article, header');
  return box.right > innerWidth + 0.5 || box.left < -0.5 || (card && box.right > card.getBoundingClientRect().right + 0.5);
}).map(node => node.tagName + ' ' + node.textContent)
"""


class Page:
    """One tab. ``events`` are all that the browser has told since it was opened."""

    def __init__(self, say: int, hear: int) -> None:
        self._say, self._hear = say, hear
        self._numbers = itertools.count(1)
        self._heard = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._say, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._heard:
            assert select.select([self._hear], [], [], max(0.0, deadline - time.monotonic()))[0], "the browser says nothing"
            heard = os.read(self._hear, 1 << 16)
            assert heard, "the browser is gone"
            self._heard += heard
        message, _, self._heard = self._heard.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def named(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, url: str) -> None:
        """Returns when it is loaded; that the page of before has just refreshed itself does not count."""
        loader = self.call("Page.navigate", url=url)["loaderId"]
        while loader not in self._loads:
            self.events.append(self._next())

    def reloaded(self) -> None:
        """Returns when it has been loaded once more by itself than anybody has noticed so far."""
        before = len(self._loads)
        while len(self._loads) == before:
            self.events.append(self._next())

    @property
    def _loads(self) -> list[str]:
        """What has been loaded, by the browser's names."""
        return [event["loaderId"] for event in self.named("Page.lifecycleEvent") if event["name"] == "load"]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to. The page's own policy does not hold for it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def scheme(self, name: str) -> None:
        """``light`` or ``dark``."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path: Path) -> None:
        """All of the page, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in this directory."""
    program = shutil.which("chromium")
    assert program, "chromium is not installed: run ops/test"
    their_in, say = os.pipe()
    hear, their_out = os.pipe()
    command = [sys.executable, "-c", _MOVE, str(their_in), str(their_out), program, *_FLAGS, f"--user-data-dir={profile}"]
    # It leaves files in TMPDIR, and has a socket there, whose path has at most 107 bytes: pytest's directories are too deep.
    leavings = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a helper of its may still be ending
    process = subprocess.Popen(
        command, pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": leavings.name},
    )  # fmt: skip
    try:
        os.close(their_in)
        os.close(their_out)
        yield Page(say, hear)
    finally:
        process.terminate()
        process.wait(PATIENCE)
        leavings.cleanup()
        os.close(say)
        os.close(hear)
