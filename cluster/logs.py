"""Logs of this project's own packages, through standard logging: as text, or as JSON lines with ``DISTILL_LOG=json``.

A line knows what its process works on: ``bind`` sets it, where a stage, a shard or a rank begins. The command writes to
standard error; actors and ranks as well, which Ray keeps in its session's logs on their node. As text the command
shows warnings alone, and not those that its own console tells; all else shows from INFO on, or from
``DISTILL_LOG_LEVEL`` on.

Ray's own ``LoggingConfig`` is no help here: it takes over the root logger of every worker, other packages' lines with
it, doesn't reach a driver before Ray has started, and can't tell shards and ranks apart.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

OURS = ("cluster", "distill_jobs")
TOLD = {"told": True}
"""``extra`` of what the console tells as well."""

_FORMAT, _LEVEL = "DISTILL_LOG", "DISTILL_LOG_LEVEL"
_FIELDS = ("pipeline", "job", "stage", "shard", "rank")
_STANDARD = {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "told", "taskName"}

_bound: dict[str, Any] = {}


def bind(**fields: Any) -> None:
    """Say what this process works on: ``pipeline``, ``job``, ``stage``, ``shard``, ``rank``; None for none."""
    _bound.update(fields)


def configure(driver: bool = True) -> None:
    """Send the lines of this process where they belong; to be called once, when it starts."""
    as_json = os.environ.get(_FORMAT, "").lower() == "json"
    handler = _Handler()
    handler.setFormatter(_Json() if as_json else _Text())
    if driver and not as_json:
        handler.setLevel(logging.WARNING)
        handler.addFilter(lambda record: not getattr(record, "told", False))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(_level())


def carried() -> dict[str, Any]:
    """What a process that Ray starts elsewhere needs in order to log as this one does; see ``adopt``."""
    return {"bound": dict(_bound), "environment": {name: os.environ.get(name, "") for name in (_FORMAT, _LEVEL)}}


def adopt(given: Mapping[str, Any], **fields: Any) -> None:
    """Log as the process that ``carried`` this, of other ``fields``."""
    os.environ.update(given["environment"])
    _bound.clear()
    bind(**given["bound"], **fields)
    configure(driver=False)


def _level() -> int:
    wanted = logging.getLevelName(os.environ.get(_LEVEL, "").upper() or "INFO")
    return wanted if isinstance(wanted, int) else logging.INFO


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """To whatever standard error is when a line is written: a progress bar may have put itself before it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Json(logging.Formatter):
    """One object a line; an exception is its text."""

    def format(self, record: logging.LogRecord) -> str:
        page = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: _bound.get(name) for name in _FIELDS},
            "node": socket.gethostname(),
            "pid": record.process,
            **_extra(record),
        }
        if record.exc_info:
            page["exception"] = self.formatException(record.exc_info)
        return json.dumps(page, default=str, ensure_ascii=False)


class _Text(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        known = {name: _bound[name] for name in _FIELDS if _bound.get(name) is not None} | _extra(record)
        beside = f" [{' '.join(f'{name}={value}' for name, value in known.items())}]" if known else ""
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S")
        line = f"{when} {record.levelname:<7} {record.name}: {record.getMessage()}{beside}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    # Ray marks records of its processes with names of its own that begin so.
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and name[0] != "_"}
