"""Lines as JSON and as text, and what a process that Ray starts takes over."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODE = """
import logging
from cluster import logs
{before}
log = logging.getLogger("cluster.some")
log.debug("small")
log.info("told", extra=logs.TOLD)
log.info("shard done", extra={{"rows": 5, "seconds": 0.5}})
logs.bind(shard=None)
log.warning("at %s:\\n50 %%", "s3://bucket/part")
try:
    raise KeyError("odd")
except KeyError:
    log.exception("failed")
logging.getLogger("another").info("not ours")
"""
DRIVER = "logs.configure()\nlogs.bind(pipeline='adult', stage='capture', shard='7')"
RANK = (
    "logs.adopt({'bound': {'stage': 'train'}, 'environment': {'DISTILL_LOG': 'json', 'DISTILL_LOG_LEVEL': ''}}, rank=1)"
)


def said(before: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **environment}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(before=before)], capture_output=True, text=True, env=env, check=True
    )
    assert not done.stdout
    return done.stderr


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines() -> None:
    found = lines(said(DRIVER, DISTILL_LOG="json"))
    assert [line["message"] for line in found] == ["told", "shard done", "at s3://bucket/part:\n50 %", "failed"]
    done, warned, failed = found[1:]
    fields = ("time", "level", "logger", "message", "pipeline", "job", "stage", "shard", "rank", "node", "pid")
    assert tuple(done)[: len(fields)] == fields
    assert (done["pipeline"], done["stage"], done["shard"], done["rank"]) == ("adult", "capture", "7", None)
    assert (done["rows"], done["seconds"], done["level"]) == (5, 0.5, "INFO") and done["time"].endswith("+00:00")
    assert warned["shard"] is None and warned["level"] == "WARNING"
    assert failed["exception"].startswith("Traceback") and failed["exception"].endswith("KeyError: 'odd'")


def test_text_for_people() -> None:
    text = said(DRIVER)
    assert "WARNING cluster.some: at s3://bucket/part:\n50 % [pipeline=adult stage=capture]" in text
    assert "KeyError: 'odd'" in text and "shard done" not in text and "not ours" not in text


def test_the_level_can_be_set() -> None:
    found = lines(said(DRIVER, DISTILL_LOG="json", DISTILL_LOG_LEVEL="debug"))
    assert found[0]["message"] == "small"
    found = lines(said(DRIVER, DISTILL_LOG="json", DISTILL_LOG_LEVEL="error"))
    assert [line["message"] for line in found] == ["failed"]
    assert len(lines(said(DRIVER, DISTILL_LOG="json", DISTILL_LOG_LEVEL="loud"))) == 4


def test_a_process_of_ray_takes_over_how_and_what_for() -> None:
    found = lines(said(RANK))
    assert all((line["stage"], line["rank"], line["pipeline"]) == ("train", 1, None) for line in found) and found


def test_nothing_is_touched_before_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("cluster.some").warning("heard")
    assert caplog.messages == ["heard"]
