"""The images: what their Dockerfiles hold, and that what runs is installed from the lock alone."""

import json
import re
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from dockerfiles import complaints, steps
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools import INFRA, ROOT, run, tool

FILES = {
    "docker": (INFRA / "docker" / "Dockerfile", ("cpu", "cuda")),
    "mlflow": (INFRA / "mlflow" / "Dockerfile", ("server",)),
}
INSTALL = INFRA / "docker" / "install.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", FILES)
def test_every_dockerfile_keeps_the_rules(name: str) -> None:
    path, targets = FILES[name]
    assert complaints(path.read_text(), targets) == []


@pytest.mark.parametrize("name", FILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    found = run(tool("hadolint"), "--no-color", str(FILES[name][0]))
    assert (found.returncode, found.stdout) == (0, "")


def test_every_dockerfile_is_known_here() -> None:
    assert {path for path, _ in FILES.values()} == set(INFRA.rglob("*Dockerfile*"))


MUTATIONS = [
    ("ARG BASE=debian:12.12-slim", "ARG BASE=debian:latest", "not pinned"),
    ("ARG BASE=debian:12.12-slim", "ARG BASE=debian", "not pinned"),
    ("USER 1000:1000", "USER root", "runs as root"),
    ("USER 1000:1000", "USER distill", "must be a number"),
    ("--no-install-recommends ", "", "--no-install-recommends"),
    (" && rm -rf /var/lib/apt/lists/*", "", "lists stay"),
    ('CMD ["distill", "--help"]', "CMD distill --help", "through a shell"),
    ("COPY cluster cluster", "COPY . .", "COPY ."),
    ("COPY cluster cluster", "ADD https://example.org/x /x", "ADD fetches"),
    ("ARG REVISION=unknown", "ARG HF_TOKEN", "HF_TOKEN would keep a secret"),
    ("PYTHONUNBUFFERED=1 ", "AWS_SECRET_ACCESS_KEY=x ", "would keep a secret"),
    ("HEALTHCHECK NONE\n", "", "has no HEALTHCHECK"),
    ("COPY --from=build-cpu /opt/distill /opt/distill", "RUN pip install distill", "takes nothing from a stage"),
    ("COPY --from=build-cpu /opt/distill /opt/distill", "RUN pip install distill", "pip's cache"),
]


@pytest.mark.parametrize(("old", "new", "said"), MUTATIONS)
def test_a_broken_dockerfile_is_told_of(old: str, new: str, said: str) -> None:
    path, targets = FILES["docker"]
    text = path.read_text()
    assert old in text
    assert any(said in why for why in complaints(text.replace(old, new), targets)), said


def test_hadolint_looks_at_all() -> None:
    text = FILES["docker"][0].read_text().replace("USER 1000:1000", "USER root")
    found = run(tool("hadolint"), "--no-color", "-", given=text)
    assert found.returncode == 1
    assert "DL3002" in found.stdout


def test_the_context_lets_in_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    kept = [line for line in lines if line and not line.startswith("#")]
    assert kept[0] == "*"
    allowed = {line[1:] for line in kept if line.startswith("!")}
    copied: set[str] = set()
    for path, _ in FILES.values():
        for step in steps(path.read_text()):
            if step.word == "COPY" and "--from=" not in step.rest:
                copied |= set(word for word in step.rest.split()[:-1] if not word.startswith("--"))
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def closure(wanted: list[str]) -> set[str]:
    """All packages that these requirements bring, by what the installed ones declare."""
    found: set[str] = set()
    pending = [(Requirement(text), "") for text in wanted]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for asked in {"", *requirement.extras}:
            if (name, asked) in seen:
                continue
            seen.add((name, asked))
            found.add(name)
            pending += [(Requirement(text), asked) for text in metadata.requires(name) or []]
    return found


def test_the_lock_pins_all_that_runs_and_more() -> None:
    """What install.sh rests on: as constraints the lock leaves nothing free that runs, and not all of it runs."""
    pins, runs = locked(), closure(PROJECT["dependencies"])
    assert runs <= pins.keys()
    only_development = pins.keys() - runs
    for text in PROJECT["optional-dependencies"]["dev"]:
        assert canonicalize_name(Requirement(text).name) in only_development


def test_the_install_script_is_sound() -> None:
    found = run(tool("shellcheck"), str(INSTALL))
    assert found.stdout == ""
    assert INSTALL.stat().st_mode & 0o111


def wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = (), **files: str) -> None:
    """A package of the fewest files that pip installs."""
    info = f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", about + "".join(f"Requires-Dist: {need}\n" for need in needs))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for path, text in files.items():
            archive.writestr(path.replace("__", "/") + ".py", text)


BACKEND = """
import tomllib, zipfile
def build_wheel(folder, settings=None, metadata=None):
    project = tomllib.load(open("pyproject.toml", "rb"))["project"]
    info, needs = "distill_jobs-0.1.dist-info", "".join(f"Requires-Dist: {x}\\n" for x in project["dependencies"])
    with zipfile.ZipFile(f"{folder}/distill_jobs-0.1-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: distill-jobs\\nVersion: 0.1\\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return "distill_jobs-0.1-py3-none-any.whl"
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_install_script_leaves_development_out_and_refuses_what_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel(index, "setuptools", "99", setuptools__build_meta=BACKEND)
    wheel(index, "torch", "1.0", ("setuptools",))
    wheel(index, "runs", "1.0", ("brought",))
    wheel(index, "runs", "2.0", ("brought",))
    wheel(index, "brought", "3.0")
    wheel(index, "develops", "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "distill-jobs"\nversion = "0.1"\ndependencies = ["torch", "runs"]\n'
        '[project.optional-dependencies]\ndev = ["develops"]\n'
    )

    def install(lock: str) -> tuple[int, str, set[str]]:
        (tmp_path / "requirements.lock").write_text(lock)
        venv = tmp_path / f"venv{len(lock)}"
        done = run("bash", "-c", f"cd {tmp_path} && {INSTALL} packages {venv}")
        listed = run(f"{venv}/bin/pip", "list", "--format=json").stdout
        return done.returncode, done.stderr, {f"{one['name']}=={one['version']}" for one in json.loads(listed)}

    code, said, there = install("brought==3.0\ndevelops==1.0\nruns==1.0\ntorch==1.0\nsetuptools==99\n")
    assert code == 0, said
    assert {"torch==1.0", "runs==1.0", "brought==3.0", "distill-jobs==0.1"} <= there
    assert not any(one.startswith("develops") for one in there)

    lock = (tmp_path / "requirements.lock").read_text()
    done = run("bash", "-c", f"cd {tmp_path} && {INSTALL} project {tmp_path}/venv{len(lock)}")
    assert done.returncode == 0, done.stderr
    assert run(f"{tmp_path}/venv{len(lock)}/bin/python", "-c", "import pip").returncode == 1

    done = run("bash", "-c", f"cd {tmp_path} && {INSTALL} these {tmp_path}/other develops")
    assert done.returncode == 0, done.stderr
    packages = tmp_path / "other" / "lib" / "python3.11" / "site-packages"
    assert {path.name for path in packages.glob("*.dist-info")} == {"develops-1.0.dist-info", "setuptools-99.dist-info"}

    code, said, _ = install("develops==1.0\nruns==1.0\ntorch==1.0\nsetuptools==99\n")
    assert code == 1
    assert re.search(r"not pinned by requirements.lock: brought==3.0; run make lock", said)
