"""The shared MLflow: compose file, manifests and scripts are sound."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_rules import KEYS, compose_complaints
from kustomizations import kustomization_complaints
from manifests import Document, policy_complaints, references, render, schema_complaints, written
from tools import INFRA, ROOT, run, tool

MLFLOW = INFRA / "mlflow"
COMPOSE = MLFLOW / "compose.yaml"
FOLDER = MLFLOW / "kubernetes"


def test_docker_compose_takes_the_file() -> None:
    done = run(tool("docker-compose"), "-f", str(COMPOSE), "config", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


def test_docker_compose_looks_at_all(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text(COMPOSE.read_text().replace("depends_on", "depend_on"))
    done = run(tool("docker-compose"), "-f", str(tmp_path / "compose.yaml"), "config", "--quiet")
    assert done.returncode != 0
    assert "depend_on" in done.stderr


def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def test_the_compose_file_keeps_the_rules() -> None:
    assert compose_complaints(compose()) == []
    assert compose()["secrets"].keys() == KEYS


BROKEN_COMPOSE: list[tuple[Callable[[Any], object], str]] = [
    (lambda c: c["services"]["postgres"].update(image="postgres:latest"), "not pinned"),
    (lambda c: c["services"]["postgres"].update(user="root"), "runs as root"),
    (lambda c: c["services"]["postgres"].pop("user"), "runs as root"),
    (lambda c: c["services"]["postgres"]["environment"].update(POSTGRES_PASSWORD="x"), "stands in the open"),
    (lambda c: c["services"]["postgres"].pop("secrets"), "isn't given"),
    (lambda c: c["services"]["postgres"].pop("mem_limit"), "no limits"),
    (lambda c: c["services"]["postgres"].pop("healthcheck"), "no healthcheck"),
    (lambda c: c["services"]["postgres"].update(ports=["5432:5432"]), "every network of the machine"),
    (lambda c: c["services"]["storage"].pop("read_only"), "write into its image"),
    (lambda c: c["services"]["storage"].pop("security_opt"), "may gain rights"),
    (lambda c: c["secrets"]["session_key"].update(file="session_key"), "which git ignores"),
    (lambda c: c["networks"].update(inside={}), "no network is internal"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN_COMPOSE)
def test_a_broken_compose_file_is_told_of(change: Callable[[Any], object], said: str) -> None:
    broken = compose()
    change(broken)
    assert any(said in why for why in compose_complaints(broken))


def test_the_manifests_keep_schemas_and_policies() -> None:
    assert kustomization_complaints(FOLDER) == []
    raw = written(FOLDER)
    assert schema_complaints(raw) == []
    documents = render(FOLDER)
    assert schema_complaints(documents) == []
    assert policy_complaints(documents) == []
    assert references(documents, "Secret") == {"mlflow"}


def variable(documents: list[Document], owner: str, name: str) -> Any:
    [one] = [d for d in documents if d["kind"] in ("Deployment", "StatefulSet") and d["metadata"]["name"] == owner]
    [container] = one["spec"]["template"]["spec"]["containers"]
    return next(v for v in container["env"] if v["name"] == name)


def test_a_service_for_nobody_and_a_secret_in_the_open_are_told_of() -> None:
    documents = written(FOLDER)
    next(d for d in documents if d["kind"] == "Service")["spec"]["ports"][0]["targetPort"] = "pg"
    secret = variable(documents, "mlflow", "PGPASSWORD")
    del secret["valueFrom"]
    secret["value"] = "x"
    told = policy_complaints(documents)
    assert any("no container has a port pg" in why for why in told)
    assert any("PGPASSWORD stands in the open" in why for why in told)


def test_versions_are_one_everywhere() -> None:
    [version] = re.findall(r"^mlflow==(.+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    services = compose()["services"]
    assert services["mlflow"]["image"] == f"distill-mlflow:{version}"
    assert f"-t distill-mlflow:{version} " in (MLFLOW / "Dockerfile").read_text()
    images = {c["image"] for d in written(FOLDER) if "template" in d.get("spec", {}) for c in _containers(d)}
    assert images == {service["image"] for service in services.values()}


def _containers(document: Document) -> list[Document]:
    return list(document["spec"]["template"]["spec"]["containers"])


def test_of_the_object_store_nothing_but_s3_is_heard() -> None:
    """Its other parts ask for no login."""
    [storage] = [d for d in written(FOLDER) if d["kind"] == "StatefulSet" and d["metadata"]["name"] == "storage"]
    [container] = _containers(storage)
    [command] = compose()["services"]["storage"]["command"]
    assert command.endswith(" ".join([*container["command"], *container["args"]]))
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0"} <= set(container["args"])


def test_the_image_is_installed_from_the_lock_alone() -> None:
    asked = re.search(r"install.sh these /opt/mlflow (.+)", (MLFLOW / "Dockerfile").read_text())
    assert asked
    pins = {line.partition("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {re.sub(r"\[.*", "", word.strip('"')).lower() for word in asked[1].split()} <= pins


@pytest.mark.parametrize("name", ["serve.sh", "secrets.sh"])
def test_scripts_are_sound(name: str) -> None:
    found = run(tool("shellcheck"), str(MLFLOW / name))
    assert found.stdout == ""
    assert (MLFLOW / name).stat().st_mode & 0o111


def test_every_secret_that_is_read_is_made_and_none_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert run("bash", str(MLFLOW / "secrets.sh"), str(folder)).returncode == 0
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert made.keys() == KEYS
    assert all(re.fullmatch(r"[0-9a-f]{48}", text) for text in made.values())
    assert len(set(made.values())) == len(KEYS)
    assert folder.stat().st_mode & 0o077 == 0
    assert run("bash", str(MLFLOW / "secrets.sh"), str(folder)).returncode == 0
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    keys = re.findall(r"secretKeyRef: \{name: mlflow, key: (\w+)\}", (FOLDER / "server.yaml").read_text())
    assert set(keys) == KEYS
    assert "infra/mlflow/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_server_without_a_secret_says_which(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(MLFLOW / "serve.sh")],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "PGPASSWORD": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "serve.sh: no AWS_ACCESS_KEY_ID: give it, or a file's path in AWS_ACCESS_KEY_ID_FILE\n",
    )
