"""The verdict at the top of the page, from ``verdict.json`` (``distill_jobs/costs/verdict.py`` says what it holds)."""

from typing import Any

from distill_jobs.report.blocks import Answer

_TONES = {"distil": "yes", "train the student alone": "no", "keep the teacher": "no"}
_GOALS = {
    "deploy": "deploy within limits",
    "accuracy": "the best quality",
    "iterate": "get from an idea to a trained model quickly",
}


def answer(verdict: dict[str, Any]) -> Answer:
    """The answer with its reasons and what speaks against it."""
    word, against = str(verdict["answer"]), verdict.get("against")
    return Answer(
        word=word if word != "not yet known" else "not yet known: measure this first",
        goal=_GOALS.get(verdict["goal"], str(verdict["goal"])),
        sentence=str(verdict["sentence"]),
        reasons=[_reason(reason) for reason in verdict["reasons"]],
        against=_reason(against) if against else None,
        then=str(verdict["next"]) if verdict.get("next") else None,
        tone=_TONES.get(word, ""),
    )


def _reason(reason: dict[str, Any]) -> tuple[str, str]:
    return str(reason["text"]), str(reason["source"] or "")
