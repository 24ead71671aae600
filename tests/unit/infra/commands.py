"""Command lines as people are told to type them, against the programs that would take them."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from tools import ROOT

PLAIN = {"cd", "export"}
"""Of the shell; nothing of theirs is checked."""

MADE = {"infra/mlflow/secrets"}
"""What is not in the repository, but is made by a command of it."""

SUBCOMMANDS = {
    "aws": {"cloudformation", "ecr", "iam"},
    "docker": {"build", "compose", "push", "run", "tag"},
    "docker compose": {"up", "down"},
    "helm": {"install", "repo", "uninstall"},
    "kind": {"create", "delete", "load"},
    "kubectl": {"apply", "create", "delete", "get", "logs", "port-forward"},
    "prometheus": set(),
    "ray": {"up", "down", "get-auth-token", "dashboard"},
    "sbatch": set(),
    "scancel": set(),
    "squeue": set(),
}
"""A short list of what we tell people to use of other programs; empty where a program has no subcommands."""


def code_blocks(page: Path) -> list[str]:
    """The commands of a page's code blocks for the shell, one each, continued lines joined, comments left out."""
    found = []
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(shlex.join(words))
    return found


def command_complaints(line: str, folder: Path = ROOT) -> list[str]:
    """What of a command isn't there: the program, its verb, its options, or files of this repository that it names."""
    found = []
    for words in _commands(shlex.split(line)):
        found += _of_program(words) + [f"no {word} in this repository" for word in words if _missing(word, folder)]
    return found


def _commands(words: list[str]) -> list[list[str]]:
    """One list of words for each program of a line: joined by && or |, and behind assignments."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", "||", ";", "&"):
            parts.append([])
        elif parts[-1] or not re.match(r"^\w+=", word):
            parts[-1].append(word)
    return [part for part in parts if part]


def _missing(word: str, folder: Path) -> bool:
    path = word.split("=", 1)[-1]
    ours = path.startswith(("infra/", "distill_jobs/", "tests/", "cluster/"))
    return ours and path not in MADE and not (folder / path).exists()


def _of_program(words: list[str]) -> list[str]:
    program, rest = Path(words[0]).name, words[1:]
    if program in PLAIN:
        return []
    if program == "bash" and rest[:1] == ["-c"]:
        return command_complaints(rest[1])
    if program == "distill":
        return _of_distill(rest)
    if program == "make":
        return [f"make has no target {word}" for word in rest if word not in _targets() and "=" not in word]
    if program == "python":
        return _of_python(rest)
    if words[0].startswith("infra/"):
        return []  # a script of ours, of which the caller sees whether it is there
    if program not in SUBCOMMANDS:
        return [f"{program} is not a program that we know of"]
    told = next((word for word in rest if not word.startswith("-")), "")
    if SUBCOMMANDS[program] and told not in SUBCOMMANDS[program]:
        return [f"{program} has no {told}"]
    if f"{program} {told}" in SUBCOMMANDS:
        return _of_second(f"{program} {told}", rest[rest.index(told) + 1 :])
    return []


def _of_second(program: str, rest: list[str]) -> list[str]:
    takes_value = {"-f", "--file", "--env-file", "-p"}
    words = iter(rest)
    for word in words:
        if word in takes_value:
            next(words, None)
        elif not word.startswith("-"):
            return [] if word in SUBCOMMANDS[program] else [f"{program} has no {word}"]
    return [f"{program} is given nothing to do"]


def _of_python(rest: list[str]) -> list[str]:
    if rest[:1] != ["-m"]:
        return []
    module = rest[1]
    if module.split(".")[0] not in ("distill_jobs", "cluster"):
        return []
    path = ROOT / module.replace(".", "/")
    return (
        [] if path.with_suffix(".py").exists() or (path / "__main__.py").exists() else [f"there is no module {module}"]
    )


@cache
def _targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def _of_distill(words: list[str]) -> list[str]:
    """Walk the real command line's verbs, then see whether the last one has these options."""
    import typer

    from distill_jobs.cli import app

    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0) if rest else ""
        if name not in command.commands:
            return [f"distill has no {name}"]
        command = command.commands[name]
    known = {word for option in command.params for word in [*option.opts, *option.secondary_opts]} | {"--help"}
    given = [word.split("=", 1)[0] for word in rest if word.startswith("-")]
    return [f"distill {command.name} has no {word}" for word in given if word not in known]
