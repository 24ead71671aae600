"""A small HTTP proxy before an object store, that answers errors, is slow, or cuts connections, as it is told."""

import http.client
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

_BODY = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>told to answer {status}</Message></Error>"
_OWN = ("connection", "transfer-encoding", "content-length")


class Storm:
    """Every ``every``-th request meets a fault, one kind after another, each where it can do harm.

    Attributes:
        season: what the caller is at, under which ``hits`` counts.
        hits: faults by season and kind.
    """

    KINDS: ClassVar[dict[str, Any]] = {
        "500": (500, "InternalError"),
        "503": (503, "SlowDown"),
        "slow": 0.7,
        "cut": "cut",
        "lost answer": "lose",
        "refused": "refuse",
    }

    def __init__(self, every: int) -> None:
        self.season, self.hits = "", Counter[tuple[str, str]]()
        self._every, self._met, self._due = every, 0, deque(self.KINDS)

    def fault(self, request: str) -> Any:
        """The fault of a request (method and path), or None."""
        self._met += 1
        if self._met % self._every:
            return None
        # An answer is cut in its middle only where it has one: of a listing, or of a file that is read.
        kind = next(kind for kind in self._due if kind != "cut" or request.startswith("GET "))
        self._due.remove(kind)
        self._due.append(kind)
        self.hits[self.season, kind] += 1
        return self.KINDS[kind]


class FaultProxy(ThreadingHTTPServer):
    """Forwards to ``host:port``. Each request takes one fault from ``faults`` while there are any, then ``always``.

    A fault is (status, code) to answer with; "cut" to close the connection after half of the answer; "lose" to close
    it without an answer though the request was carried out; "refuse" to close it before that; a number of seconds to
    wait before the request is forwarded; or None.

    Attributes:
        only: faults meet the requests alone whose method and path contain this.
        storm: takes the place of all these while it is set.
        seen: method and path of each request.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = (host, port)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self._lock = threading.Lock()
        self.clear()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def clear(self) -> None:
        """Behave from now on."""
        self.faults: list[Any] = []
        self.always: Any = None
        self.only = ""
        self.storm: Storm | None = None
        self.seen: list[str] = []

    def next_fault(self, request: str) -> Any:
        with self._lock:
            self.seen.append(request)
            if self.storm is not None:
                return self.storm.fault(request)
            if self.only not in request:
                return None
            return self.faults.pop(0) if self.faults else self.always

    def stop(self) -> None:
        """Close the listening socket: from now on connections are refused."""
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that has given up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def any_method(self) -> None:
        body = self._body()
        fault = self.server.next_fault(f"{self.command} {self.path}")
        if isinstance(fault, tuple):
            status, code = fault
            text = _BODY.format(code=code, status=status).encode()
            self._answer(status, {"Content-Type": "application/xml", "Content-Length": str(len(text))}, text)
            return
        if fault == "refuse":
            self.close_connection = True
            return
        if isinstance(fault, int | float):
            time.sleep(fault)
        upstream = http.client.HTTPConnection(*self.server.store, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data, length = answer.read(), answer.headers["Content-Length"]
        upstream.close()
        if fault == "lose":
            self.close_connection = True
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
        headers["Content-Length"] = (length or "0") if self.command == "HEAD" else str(len(data))
        self._answer(answer.status, headers, data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = self.close_connection or fault == "cut"

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = any_method

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # Forwarded in one piece, which has a length again.
        del self.headers["Transfer-Encoding"]
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """A test says what it wants to say."""
