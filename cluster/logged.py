"""What MLflow is given: keys that it takes, values that fit, and no secrets among them."""

import json
import re
from collections.abc import Mapping
from typing import Any

_PARAM_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 8000, 250
# "token" alone is a secret; "tokens" and "tokenizer" are this field's daily bread.
_SECRET = re.compile(r"(^|[_-])(token|(password|passwd|secret|credential|(api|access|private)_?key)s?)$", re.I)
_LOGIN = re.compile(r"(://)[^/@\s]+@")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with text values; None is left out, secrets are blanked, long values cut."""
    found: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= flatten(value, f"{key}.")
        elif value is not None:
            found[key_for(key)] = _text(key, value)[:_PARAM_LENGTH]
    return found


def tags_for(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags with keys and values that MLflow takes."""
    return {key_for(key): _text(key, value)[:_TAG_LENGTH] for key, value in values.items()}


def is_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret."""
    return _SECRET.search(name.rpartition(".")[2]) is not None


def key_for(name: str) -> str:
    """``name`` with what MLflow refuses in a key replaced: other signs, and steps that would leave a folder."""
    clean = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    return "/".join(step for step in clean.split("/") if step.strip("."))[:_KEY_LENGTH] or "_"


def without_login(text: str) -> str:
    """``text`` with user names and passwords of addresses blanked."""
    return _LOGIN.sub(r"\1***@", text)


def one_line(error: BaseException) -> str:
    """An error's message on one line of bearable length."""
    text = without_login(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _text(key: str, value: Any) -> str:
    if is_secret(key):
        return "(not logged)"
    return without_login(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))
