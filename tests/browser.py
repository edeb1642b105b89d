# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium over its DevTools pipe, with nothing but the standard library: what a page does in a real browser.

https://chromedevtools.github.io/devtools-protocol/ describes the methods that `call` takes.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0  # seconds for one answer
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " ")}


def chromium() -> str | None:
    """The browser's path, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, process: subprocess.Popen[bytes], requests: int, answers: int) -> None:
        self._process, self._requests, self._answers = process, requests, answers
        self._buffer, self._count, self._session = b"", 0, ""
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools method, answered."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._events.append(answer["method"])
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        """The next message: an answer or an event."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._answers, 1 << 20)
            assert piece, f"the browser has gone (exit status {self._process.poll()})"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, address: Path | str) -> None:
        """Shows a file, or an address, and waits until it has loaded."""
        self._events.clear()
        self.call("Page.navigate", url=address.as_uri() if isinstance(address, Path) else address)
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._read()["method"])

    def evaluate(self, script: str) -> Any:
        """What a JavaScript expression is worth, as plain data."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def size(self, width: int, height: int = 900) -> None:
        """The window, in CSS pixels; below 800 a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800
        )

    def media(self, scheme: str = "light", kind: str = "screen") -> None:
        """Colours asked for (light, dark) and what the page is for (screen, print)."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def press(self, key: str) -> None:
        """A key down and up."""
        code, number, text = KEYS[key]
        same = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What is in the window, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page on A4 paper."""
        self.media(kind="print")
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"]
        return base64.b64decode(data)


def _high(descriptor: int) -> int:
    """The same file under a number that 3 and 4 cannot overwrite."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser that ends with the block; `profile` is an empty folder of its own."""
    binary = chromium()
    assert binary, "no Chromium"
    # It reads requests from its descriptor 3 and answers on 4; the shell puts them there.
    their_requests, requests, answers, their_answers = (_high(end) for pair in (os.pipe(), os.pipe()) for end in pair)
    command = f'exec "$0" "$@" 3<&{their_requests} 4>&{their_answers}'
    process = subprocess.Popen(
        ["bash", "-c", command, binary, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(their_requests, their_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_requests)
    os.close(their_answers)
    try:
        yield Page(process, requests, answers)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)
        os.close(requests)
        os.close(answers)
