"""A headless Chromium for tests of pages, spoken to over a pipe in the DevTools protocol.

Nothing but the standard library, and no port is opened. One browser serves a whole test module; each page gets a
context of its own, so that pages don't know of each other.
"""

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

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
)
_PATIENCE = 60.0


class Page:
    """One page: what it asked for, what went wrong on it, and how it looks.

    Attributes:
        requests: every address that was asked for, the page's own included.
        problems: uncaught exceptions, and what was written to the console as an error or a warning.
    """

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self._session = browser, session
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._loaded = False

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, params, self._session)

    def heard(self, method: str, params: dict[str, Any]) -> None:
        if method in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            self.requests.append(params["request"]["url"] if "request" in params else params["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(each.get("value", each)) for each in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, place: Path | str) -> None:
        """Go to a file or address, and wait until it is loaded."""
        self._loaded = False
        self.do("Page.navigate", url=place.as_uri() if isinstance(place, Path) else place)
        self._browser.until(lambda: self._loaded, f"{place} has not loaded")

    def login(self, user: str, password: str) -> None:
        """Send this login with every request."""
        secret = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.do("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {secret}"})

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth (a promise's result, where it is one)."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        self._browser.until(lambda: self.value(expression), f"never came true: {expression}")

    def look(self, dark: bool, printed: bool = False) -> None:
        """Light or dark, on a screen or on paper."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", media="print" if printed else "screen", features=[scheme])

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the whole page, or of its first screen."""
        shot = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.do("Page.printToPDF", printBackground=False)["data"])

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


class Browser:
    """The process, and the pages in it."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def place() -> None:  # the protocol's pipes are file descriptors 3 and 4
            moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
            for fd, copy in zip((3, 4), moved, strict=True):
                os.dup2(copy, fd)

        with (profile.parent / "chromium.log").open("wb") as log:
            command = [PROGRAM, *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(3, 4), preexec_fn=place
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        self._number, self._rest = 0, b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def close(self) -> None:
        self.call("Browser.close", {})
        self._process.wait(timeout=_PATIENCE)
        os.close(self._in)
        os.close(self._out)

    @contextmanager
    def page(self, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True) -> Iterator[Page]:
        """A new page of so many CSS pixels."""
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.do(f"{domain}.enable")
        phone = width < 600
        page.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        page.look(dark)
        page.do("Emulation.setScriptExecutionDisabled", value=not scripts)
        yield page
        self.call("Target.disposeBrowserContext", {"browserContextId": context})
        del self._pages[session]

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self.until(lambda: number in self._answers, f"no answer to {method}")
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return dict(answer["result"])

    def until(self, true: Any, otherwise: str) -> None:
        """Listen until ``true()``."""
        end = time.monotonic() + _PATIENCE
        while not true():
            assert time.monotonic() < end, otherwise
            self._listen()

    def _listen(self) -> None:
        if not select.select([self._in], [], [], 0.05)[0]:
            return
        some = os.read(self._in, 1 << 20)
        assert some, "Chromium has gone away; see chromium.log beside its profile"
        *whole, self._rest = (self._rest + some).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].heard(message["method"], message["params"])
