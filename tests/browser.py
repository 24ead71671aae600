"""A headless Chromium, driven by its own protocol: open a page, ask its DOM, take a picture."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp


def chromium() -> str | None:
    """The browser that Debian's package ``chromium`` installs; None where it isn't."""
    return shutil.which("chromium")


class Browser:
    """One window of a given size in pixels."""

    def __init__(self, program: str, width: int = 1280, height: int = 900) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="chromium-"))
        self._loop = asyncio.new_event_loop()
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={self._folder}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
        command += ["--hide-scrollbars", "--no-first-run", "--disable-background-networking", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._number = 0

    def __enter__(self) -> Self:
        port = self._folder / "DevToolsActivePort"
        self._until(lambda: port.exists() and port.read_text().count("\n") >= 1, 60)
        self._loop.run_until_complete(self._connect(int(port.read_text().split()[0])))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def login(self, user: str, password: str) -> None:
        """Send this login with every request."""
        secret = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._call("Network.enable")
        self._call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {secret}"})

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        """What a person reads on the page."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait_for(self, *words: str, seconds: float = 60) -> str:
        """The page's text, once all the words are in it."""
        self._until(lambda: all(word in self.text() for word in words), seconds, lambda: self.text()[:2000])
        return self.text()

    def picture(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [each for each in await answer.json() if each["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        async def call() -> dict[str, Any]:
            self._number += 1
            await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": params}))
            while True:
                answer = json.loads((await self._socket.receive(timeout=60)).data)
                if answer.get("id") == self._number:
                    assert "error" not in answer, answer
                    return dict(answer["result"])

        return self._loop.run_until_complete(call())

    @staticmethod
    def _until(true: Any, seconds: float, seen: Any = str) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, seen()
            time.sleep(0.2)
