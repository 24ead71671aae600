"""Guards: which package may import what, what parsing may load, and how long a file may be."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = [
    {"spec"},
    {"data"},
    {"models"},
    {"store"},
    {"capture", "losses"},
    {"training"},
    {"audit", "costs"},
    {"tuning"},
    {"report"},
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}
ENGINES = {"ray", "deepspeed", "mlflow"}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_cluster_knows_nothing_of_distillation() -> None:
    for path in sources("cluster"):
        assert not any(name.split(".")[0] == "distill_jobs" for name in imports_of(path)), path


def test_only_cluster_imports_ray_deepspeed_and_mlflow() -> None:
    for path in sources("distill_jobs"):
        assert not {name.split(".")[0] for name in imports_of(path)} & ENGINES, path


def test_packages_import_leftwards() -> None:
    for path in sources("distill_jobs"):
        package = path.relative_to(ROOT / "distill_jobs").parts[0]
        if package not in RANK:
            continue
        for name in imports_of(path):
            steps = name.split(".")
            if steps[0] == "distill_jobs" and len(steps) > 1 and steps[1] in RANK and steps[1] != package:
                assert RANK[steps[1]] < RANK[package], f"{path} imports {name}"


def test_files_stay_readable() -> None:
    for path in sources("cluster") + sources("distill_jobs"):
        assert len(path.read_text().splitlines()) <= 320, f"{path} is too long"


def test_no_two_files_of_tests_share_a_name() -> None:
    # Tests import their helpers by name, from whichever folder comes first.
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} == {"conftest.py"}


@pytest.mark.parametrize("module", ["distill_jobs.spec", "distill_jobs.cli"])
def test_parsing_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "ray", "mlflow", "pyarrow", "transformers"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_pickle_in_what_is_read() -> None:
    for path in sources("cluster") + sources("distill_jobs"):
        assert not {"pickle", "cloudpickle", "dill", "marshal"} & imports_of(path), path
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "weights_only=False" not in text, path
        assert "yaml.load(" not in text, path
