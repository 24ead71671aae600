"""Dockerfiles as instructions, and what every one of ours must hold beyond what hadolint looks at."""

import re
from dataclasses import dataclass

_SECRET = re.compile(r"(?i)(password|passwd|secret|token|credential|access_?key|api_?key)")
_STARTER = re.compile(r"^\s*\[\s*\"")


@dataclass(frozen=True)
class Step:
    """One instruction: ``FROM``, and what stands after it."""

    word: str
    rest: str


def steps(text: str) -> list[Step]:
    """The instructions in order, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages(text: str) -> dict[str, tuple[str, list[Step]]]:
    """Each stage's name: what it starts from, and its own instructions."""
    found: dict[str, tuple[str, list[Step]]] = {}
    name = ""
    for step in steps(text):
        if step.word == "FROM":
            source, *rest = step.rest.split()
            name = rest[1] if len(rest) == 2 else str(len(found))
            found[name] = (source, [])
        elif name:
            found[name][1].append(step)
    return found


def chain(text: str, stage: str) -> list[Step]:
    """All that was done for a stage: the instructions of what it starts from, then its own."""
    known = stages(text)
    source, own = known[stage]
    return (chain(text, source) if source in known else []) + own


def complaints(text: str, targets: tuple[str, ...]) -> list[str]:
    """What is wrong with a Dockerfile whose ``targets`` are what people run."""
    known = stages(text)
    found = [why for why in map(_unpinned, _bases(text, known)) if why]
    found += [why for step in steps(text) for why in _of_step(step)]
    for target in targets:
        found += [f"{target}: {why}" for why in _of_target(chain(text, target), known)]
    return found


def _bases(text: str, known: dict[str, tuple[str, list[Step]]]) -> list[str]:
    before = [step.rest for step in steps(text)[: next(i for i, s in enumerate(steps(text)) if s.word == "FROM")]]
    defaults = dict(rest.split("=", 1) for rest in before if "=" in rest)
    sources = [source for source, _ in known.values() if source not in known]
    return [re.sub(r"\$\{?(\w+)\}?", lambda match: defaults.get(match[1], ""), source) for source in sources]


def _unpinned(image: str) -> str | None:
    name, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" in image:
        return None
    if not tag or tag == "latest" or not re.search(r"\d", tag):
        return f"the base {name or image!r} is not pinned to a version"
    return None


def _of_step(step: Step) -> list[str]:
    found = []
    if step.word in ("ARG", "ENV"):
        names = [word.split("=", 1)[0] for word in re.findall(r"[^\s\"]+(?:=(?:\"[^\"]*\"|\S*))?", step.rest)]
        found += [f"{step.word} {name} would keep a secret in the image" for name in names if _SECRET.search(name)]
    if step.word == "ADD":
        found.append("ADD fetches and unpacks: use COPY")
    if step.word == "COPY" and step.rest.split()[-2:-1] == ["."]:
        found.append("COPY . takes whatever lies in the folder")
    if step.word in ("CMD", "ENTRYPOINT") and not _STARTER.match(step.rest):
        found.append(f"{step.word} goes through a shell, which swallows signals: give a list")
    if step.word == "RUN" and "apt-get install" in step.rest:
        if "--no-install-recommends" not in step.rest:
            found.append("apt-get install without --no-install-recommends")
        if "rm -rf /var/lib/apt/lists/*" not in step.rest:
            found.append("apt's lists stay in the layer")
    if step.word == "RUN" and re.search(r"\bpip3? install\b", step.rest) and "--no-cache-dir" not in step.rest:
        found.append("pip's cache stays in the layer")
    return found


def _of_target(done: list[Step], known: dict[str, tuple[str, list[Step]]]) -> list[str]:
    found = []
    user = next((step.rest for step in reversed(done) if step.word == "USER"), "")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user):
        found.append(f"runs as {user or 'root'}: the last USER must be a number above 0, which Kubernetes can check")
    words = {step.word for step in done}
    found += [f"has no {word}" for word in ("LABEL", "HEALTHCHECK", "CMD") if word not in words]
    copied = {match[1] for step in done if step.word == "COPY" and (match := re.search(r"--from=(\S+)", step.rest))}
    if not copied & known.keys():
        found.append("takes nothing from a stage of its own: what only building needs would stay in it")
    return found
