# SPDX-License-Identifier: Apache-2.0
"""Drives headless Chromium over its DevTools pipe, with the standard library alone.

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
TIMEOUT = 60.0  # seconds to wait for an answer
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " ")}


def chromium() -> str | None:
    """The path of the browser; None if it is not installed."""
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
        """Calls a DevTools method and returns its result."""
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
        """Reads the next message, an answer or an event."""
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._answers, 1 << 20)
            assert piece, f"the browser has gone (exit status {self._process.poll()})"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, address: Path | str) -> None:
        """Opens a file or an address and waits until it has loaded."""
        self._events.clear()
        self.call("Page.navigate", url=address.as_uri() if isinstance(address, Path) else address)
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._read()["method"])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, as plain data."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def size(self, width: int, height: int = 900) -> None:
        """Sets the window size in CSS pixels; widths below 800 emulate a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800
        )

    def media(self, scheme: str = "light", kind: str = "screen") -> None:
        """Emulates a colour scheme (light, dark) and a medium (screen, print)."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        code, number, text = KEYS[key]
        same = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window or of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as a PDF on A4 paper."""
        self.media(kind="print")
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"]
        return base64.b64decode(data)


def _high(descriptor: int) -> int:
    """Moves a file descriptor to a number of 10 or more, so that 3 and 4 are free."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Starts a browser for the block and yields a page; `profile` is an empty folder."""
    binary = chromium()
    assert binary, "no Chromium"
    # Chromium reads requests from descriptor 3 and answers on 4; the shell sets them up.
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
        process.wait(timeout=TIMEOUT)
        os.close(requests)
        os.close(answers)
