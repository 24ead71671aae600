"""The real programs that check files here: those of the development packages, and others where the machine has them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"


def tool(name: str) -> str:
    """Where a program is: beside this Python, or on the search path; the test is skipped where it is neither."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"this machine has no {name}")
    return found


def run(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=240, check=False)
