"""``distill store export`` and ``import``, as a person types them."""

from pathlib import Path

import numpy as np
import pytest
from exchange_cases import teacher, write_topk
from typer.testing import CliRunner

from cluster.files import Folder
from distill_jobs.cli import app
from distill_jobs.store.reader import LogitStore


def test_there_and_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [list(b"a plain text")] + [rng.integers(0, 256, 12).tolist() for _ in range(2)]
    dense = [teacher(rng, 12, 258) for _ in rows]
    for name, some in {"a": slice(2), "b": slice(2, 3)}.items():
        write_topk(tmp_path / "in" / f"{name}.parquet", rows[some], dense[some], 8)

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["store", *words])
        assert done.exit_code == 0, done.output
        return done.output

    one, out = str(tmp_path / "one"), str(tmp_path / "out")
    said = run("import", str(tmp_path / "in"), "--into", one, "--tokenizer", "bytes", "--teacher", "somebody")
    assert "holds 3 rows, 36 tokens" in said
    told = run("inspect", one, "--samples", "30")
    assert "import:somebody" in told and "a plain" in told and "is whole" in run("verify", one)
    assert "holds 3 rows in 2 shards" in run("export", one, "--to", out)
    assert (tmp_path / "out" / "export.json").exists()
    assert "holds 3 rows" in run("export", one, "--to", str(tmp_path / "hf"), "--format", "datasets")
    words = ["--into", str(tmp_path / "two"), "--tokenizer", "bytes", "--k", "4", "--length", "12"]
    assert "holds 3 rows" in run("import", out, *words)
    assert LogitStore.open(Folder(str(tmp_path / "two"))).plan.codec == {"name": "topk", "k": 4}


@pytest.mark.parametrize("words", [["export"], ["import", "x"], ["export", "x", "--to", "y", "--format", "csv"]])
def test_words_that_are_missing_or_wrong(words: list[str]) -> None:
    assert CliRunner().invoke(app, ["store", *words]).exit_code == 2
