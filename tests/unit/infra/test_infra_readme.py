"""The page on where to run it: every command, file, secret and price on it is there."""

import re
from pathlib import Path

import pytest
import yaml
from commands import SUBCOMMANDS, code_blocks, command_complaints
from manifests import amount, pods, references, render
from tools import INFRA, ROOT, run, tool

PAGE = INFRA / "README.md"
COMMANDS = code_blocks(PAGE)
FOLDERS = [*sorted((INFRA / "kuberay" / "overlays").iterdir()), INFRA / "mlflow" / "kubernetes"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_there(command: str) -> None:
    assert command_complaints(command) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("distill sumbit job.yaml", "distill has no sumbit"),
        ("distill submit job.yaml --adress http://head:8265", "has no --adress"),
        ("distill jobs kill x", "distill has no kill"),
        ("make demonstration", "no target demonstration"),
        ("kubectl aply -k infra/kuberay/overlays/kind", "kubectl has no aply"),
        ("kubectl apply -k infra/kuberay/overlays/kinds", "no infra/kuberay/overlays/kinds"),
        ("docker compose -f infra/mlflow/compose.yaml upp", "docker compose has no upp"),
        ("docker compose -f infra/mlflow/compose.yml up", "no infra/mlflow/compose.yml"),
        ("ray upp infra/aws/cluster.yaml", "ray has no upp"),
        ("python -m distill_jobs.examples.fetched", "no module"),
        ("X=1 infra/mlflow/secret.sh", "no infra/mlflow/secret.sh"),
        ("wget http://example.org", "not a program"),
    ],
)
def test_a_wrong_command_is_told_of(command: str, said: str) -> None:
    assert any(said in why for why in command_complaints(command))


def test_kubectl_has_the_options_that_it_is_given() -> None:
    everywhere = run(tool("kubectl"), "options").stdout
    for words in (line.split() for line in COMMANDS if line.startswith("kubectl ")):
        told = words[1 : next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]
        told = told[: 3 if told[0] == "create" else 1]
        manual = run(tool("kubectl"), *told, "--help").stdout + everywhere
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert f"{option}=" in manual, f"kubectl {' '.join(told)} has no {option}"


def test_ray_and_compose_have_what_we_say_they_have() -> None:
    from ray.scripts.scripts import cli

    assert SUBCOMMANDS["ray"] <= cli.commands.keys()
    listed = run(tool("docker-compose"), "--help").stdout
    assert all(re.search(rf"^  {word} ", listed, flags=re.MULTILINE) for word in SUBCOMMANDS["docker compose"])


def test_every_link_leads_somewhere() -> None:
    text = PAGE.read_text()
    headings = {
        re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (PAGE.parent / target).exists(), target


def test_every_secret_is_named() -> None:
    text = PAGE.read_text()
    for folder in FOLDERS:
        for name in references(render(folder), "Secret"):
            assert f"`{name}`" in text or f"secret generic {name} " in text, name


def test_every_way_to_run_it_is_named() -> None:
    text = PAGE.read_text().lower()
    for path in [*INFRA.iterdir(), *(INFRA / "kuberay" / "overlays").iterdir()]:
        assert not path.is_dir() or path.name in text, path


def price(accelerator: str | None, cpus: float, *, spot: bool) -> float:
    book = yaml.safe_load((ROOT / "distill_jobs" / "costs" / "prices.yaml").read_text())
    kind = "spot" if spot else "usd"
    return cpus * float(book["cpu_hour"][kind]) + (
        float(book["accelerator_hour"][accelerator][kind]) if accelerator else 0
    )


def row(name: str) -> str:
    return next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))


def requested(folder: Path, who: str) -> float:
    pod = next(pod for pod in pods(render(folder)) if pod.owner.endswith(who))
    return sum(amount(container["resources"]["requests"]["cpu"]) for container in pod.containers)


def test_prices_are_the_price_books() -> None:
    cloud = INFRA / "kuberay" / "overlays" / "cloud"
    head, gpu, cpu = (requested(cloud, who) for who in ("head", "teacher", "cpu"))
    resting, with_gpu = price(None, head, spot=False), price("L40S", gpu, spot=True)
    with_cpus = price(None, cpu, spot=True)
    for figure in (resting, with_gpu, with_cpus, resting + 12 * with_gpu + 8 * with_cpus):
        assert f"${figure:.2f}" in row("`cloud`")
    server = sum(requested(INFRA / "mlflow" / "kubernetes", who) for who in ("mlflow", "postgres", "storage"))
    assert row("MLflow on Kubernetes").count(f"${price(None, server, spot=False):.2f}") == 2
    assert f"${120 * 0.023:.2f} a month" in row("MLflow on Kubernetes")
    # m7i.large has 2 CPUs, g6e.2xlarge 8 and one L40S, g6e.12xlarge 48 and four.
    student = price(None, 48, spot=True) + 4 * price("L40S", 0, spot=True)
    for figure in (price(None, 2, spot=False), price("L40S", 8, spot=True), student):
        assert f"${figure:.2f}" in row("AWS")
