"""The reckoning on the page: verdict first, every section where its file is, and what becomes of damage."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from reckoning_cases import against, alternatives, audit, estimate, plan, reckoned, tuning, verdict
from report_cases import HOSTILE, finished

from cluster.files import Folder
from distill_jobs.report import bias, ceiling, gates, html, negative, spending, tuned
from distill_jobs.report.blocks import Folded, Table
from distill_jobs.report.blocks import Points as Sentences
from distill_jobs.report.blocks import Text as Paragraph

FILES = ("audit.json", "verdict.json", "tune/trials.json", "store/negative.json", "alternatives.json", "plan.json")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html.render(reckoned(finished(tmp_path_factory.mktemp("reckoned")), HOSTILE)).replace("\u00a0", " ")


def words_of(blocks: Any) -> str:
    """All words of blocks, without their charts."""
    told = []
    for block in blocks:
        if isinstance(block, Folded):
            block = block.inside
        if isinstance(block, Table):
            assert all(len(row) == len(block.headings) for row in block.rows)
            told += [cell for row in [block.headings, *block.rows] for cell in row]
        elif isinstance(block, Sentences):
            told += block.sentences
        elif isinstance(block, Paragraph):
            told.append(block.text)
    return " | ".join(told).replace("\u00a0", " ")


def test_energy_and_what_was_foreseen_are_told(page: str) -> None:
    costs = page[page.index('id="costs"') : page.index('id="quality"')]
    for words in ("g CO2e", "at spot prices", "By node and kind of device", "Predicted before the run were $6.00"):
        assert words in costs


def test_the_verdict_comes_first(page: str) -> None:
    head = page[page.index("<h1>") : page.index("<nav")]
    for words in ("train the student alone", "There is nothing to pass on.", "It may be luck.", "audit.json"):
        assert words in head
    assert "<code>distill tune SPEC</code> &lt;b&gt;now" in head
    assert "Learning from the teacher helped" not in head, "the finding stands in for a verdict only"


def test_sections_come_in_their_order(page: str) -> None:
    found = re.findall(r'<section id="(\w+)">', page)
    assert found == ["costs", "quality", "curves", "tuning", "bias", "negative", "store", "provenance"]
    assert page.count('class="live"') == 13 and page.count('id="plotly"') == 1
    assert "Left out" not in page


def test_hostile_names_stay_text(page: str) -> None:
    body = page[: page.index('id="plotly"')]
    assert "<a href" not in body.replace('<a href="#', "") and "alert(1)</script>" not in body
    assert body.count("<script") == 14, "one for the data of each live figure, and that which holds plotly"


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    workdir = Folder(str(tmp_path))
    workdir.write_json(name, {"schema_version": 1, "curves": 3})
    assert f"Left out, because it can't be read: {name}" in html.render(workdir)
    workdir.write(name, b"{")
    assert f"Left out, because it can't be read: {name}" in html.render(workdir)


def test_a_verdict_of_another_shape_is_text(tmp_path: Path) -> None:
    workdir = Folder(str(tmp_path))
    workdir.write_json("verdict.json", {**verdict(), "next": ["<b>"]})
    assert "[&#39;&lt;b&gt;&#39;]" in html.render(workdir)


def test_damage_costs_only_its_own_section(tmp_path: Path) -> None:
    workdir = reckoned(Folder(str(tmp_path)))
    workdir.write_json("audit.json", {"bias": {"columns": {"sex": 3}}})
    text = html.render(workdir)
    assert text.count("Left out, because it can't be read: audit.json.") == 1
    assert 'id="tuning"' in text and "In what it teaches" in text and "gate" not in text


def test_without_the_files_nothing_is_said_of_them(tmp_path: Path) -> None:
    text = html.render(finished(tmp_path))
    assert "ceiling" not in text and "Tuning" not in text and "mistakes" not in text and "<script" not in text


def test_quality_is_told_with_intervals() -> None:
    told = words_of(ceiling.blocks(audit()))
    assert "85.00 %\n84.00 % to 86.00 %" in told and "0.015\n0.010 to 0.030" in told
    assert "1,000 bootstrap resamples of 16,281 rows" in told and "there is too little" in told
    arms = [row[0] for row in ceiling.table(audit()["ceiling"], audit()["calibration"]).rows]
    assert arms == ["teacher", "student", "baseline", "gate-drop"]


def test_gaps_that_matter_come_first() -> None:
    found = audit()["bias"]
    told = words_of(bias.blocks(found))
    assert "Of 3 gaps between groups: 1 inherited, 1 amplified, 1 no gap shown." in told
    assert "equalized odds difference over sex is 0.100 (95 % interval 0.090 to 0.110), above 0.05" in told
    assert told.index("sex: Female, FPR") < told.index("sex: Female, TPR") and "it has 3 rows" in told
    nothing = copy.deepcopy(found)
    nothing["labels"] = dict.fromkeys(nothing["labels"], 0)
    assert "too small" in bias.comes_to(nothing, 0)


def test_mistakes_are_told_before_and_after_training() -> None:
    found = audit()["negative"]
    assert "confidently wrong at 40 of 800 positions" in words_of(negative.stored(found["train"]))
    assert "takes over more of them than its likeness" in words_of(negative.taken_over(found))
    few = {**found, "heldout": {**found["heldout"], "small": True, "mistakes": 3}}
    assert "too few" in words_of(negative.taken_over(few))
    assert "no label" in words_of(negative.stored({"value": None, "why": "no label"}))


@pytest.mark.parametrize(
    ("kept", "lost", "words"),
    [
        (0.3, 0.001, "Shown to cut the negative transfer at least by half, with no loss of quality shown: drop"),
        (0.45, 0.001, "As measured, drop cut"),
        (0.8, 0.001, "No gate cut"),
        (0.3, -0.05, "No gate cut"),
    ],
)
def test_a_gate_has_to_halve_the_transfer(kept: float, lost: float, words: str) -> None:
    found = audit(kept=kept)["gates"]
    found[-1]["over_student"] = estimate(lost)
    assert gates.halves(found).startswith(words)


def test_where_nothing_is_taken_over_no_gate_is_said_to_help() -> None:
    found = audit()["gates"]
    found[-1]["transfer_kept"] = estimate(None, why="there is nothing to cut")
    assert "there is nothing to cut" in gates.halves(found)
    assert gates.blocks(audit(gates=False)) == []


def test_tuning_says_what_it_can_not_tell() -> None:
    made = tuning("x")
    told = words_of(tuned.blocks(made["trials"], made["surface"], made["importance"]))
    assert "not distinguishable from nothing" in told and "cost $0.50 more than a teacher that answers live" in told
    nothing = {
        **made["surface"],
        **dict.fromkeys(("temperature", "alpha", "mean", "noise", "explains")),
        "why": "too few",
    }
    told = words_of(tuned.blocks(made["trials"], nothing, None))
    assert "No surface over T and alpha: too few." in told
    unfinished = {**made["trials"], "student": {**made["trials"]["student"], "best": None}}
    assert "none of 4 trainings" in tuned.sentence(unfinished, "student")


def test_money_is_told_beside_what_was_foreseen_and_the_alternatives() -> None:
    told = words_of(spending.foreseen(against(), plan()))
    assert "1.50× the money" in told and "2 × the actors" in told and "evaluate" not in told
    told = words_of(spending.alternatives(alternatives()))
    assert "cost $1.00 more than asking a live teacher" in told and "from 5 trainings on" in told
    assert "measured once" in told and "Store once: capture + months." in told
    assert "can't be priced: no store" in words_of(spending.alternatives({"measured": None, "why": "no store"}))


def test_every_answer_has_its_tone(tmp_path: Path) -> None:
    workdir = Folder(str(tmp_path))
    for answer, tone in (("distil", "answer yes"), ("keep the teacher", "answer no"), ("not yet known", "answer ")):
        workdir.write_json("verdict.json", verdict(answer))
        assert f'<div class="{tone}">' in html.render(workdir)
