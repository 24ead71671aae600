"""The dashboard, the alerts and what finds the nodes, held against the metrics that the code declares."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants
from tools import INFRA, ROOT, run, tool

from cluster.metrics import EXPORTED, METRICS, exported
from distill_jobs.live import _TRAINING

GRAFANA = INFRA / "grafana"
DECLARED = {full: name for name in METRICS for full in exported(name)}


def panels() -> Iterator[tuple[str, str]]:
    """Every expression of the dashboard, with the panel that it is drawn in; a variable stands for all it may be."""
    for panel in json.loads((GRAFANA / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$pipeline", ".*")


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def expressions() -> list[tuple[str, str]]:
    return [*panels(), *((rule["alert"], rule["expr"]) for rule in alerts())]


def test_every_metric_that_is_asked_for_is_declared_and_every_declared_one_is_shown() -> None:
    asked: set[str] = set()
    for title, text in expressions():
        names = set(re.findall(rf"\b{EXPORTED}\w+", text))
        assert names and names <= DECLARED.keys(), f"{title}: {names - DECLARED.keys()}"
        asked |= {DECLARED[name] for name in names}
    assert asked == METRICS.keys()
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    assert f"label_values({EXPORTED}running, pipeline)" in json.dumps(dashboard["templating"])
    shown = [(panel["id"], panel["gridPos"]["x"] + panel["gridPos"]["w"]) for panel in dashboard["panels"]]
    assert len({number for number, _ in shown}) == len(shown) and all(right <= 24 for _, right in shown)


def test_every_number_that_is_told_is_declared() -> None:
    told: set[str] = set()
    for path in [*(ROOT / "cluster").rglob("*.py"), *(ROOT / "distill_jobs").rglob("*.py")]:
        told |= set(re.findall(r'STANDING\.(?:show|add|observe)\("(\w+)"', path.read_text()))
    # What ranks report goes by a table of its own; what the process as a whole does is told by the publisher.
    assert told | set(_TRAINING.values()) | {"running", "waiting", "faults"} == METRICS.keys()


def test_only_tags_that_a_metric_has_are_asked_for() -> None:
    for title, text in expressions():
        known = {"pipeline", "stage", "le"}
        for name in re.findall(rf"\b{EXPORTED}\w+", text):
            known |= set(METRICS[DECLARED[name]].tags)
        by = [tag.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", text) for tag in group.split(",")]
        matched = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", text)
        assert set(by) | set(matched) <= known, title
    for rule in alerts():
        for tag in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
            assert tag in rule["expr"], rule["alert"]


def test_prometheus_takes_them(tmp_path: Path) -> None:
    promtool = tool("promtool")
    for what, name in (("config", "prometheus.yaml"), ("rules", "alerts.yaml")):
        done = run(promtool, "check", what, str(GRAFANA / name))
        assert done.returncode == 0, done.stdout + done.stderr
    rules = [{"record": f"panel:{i}", "expr": text} for i, (_, text) in enumerate(panels())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = run(promtool, "check", "rules", str(tmp_path / "panels.yaml"))
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr


# Minute by minute, what one pipeline tells; and from which minute to which an alert is raised.
CASES: dict[str, tuple[dict[str, str], list[tuple[int, bool]]]] = {
    "DistillNoProgress": (
        {"running": "1x60", "done": "0+5x20 100x40", "waiting": "0x60"},
        [(19, False), (30, False), (45, True)],
    ),
    "DistillWaitsForCluster": ({"running": "1x60", "waiting": "0x9 1x50"}, [(20, False), (45, True)]),
    "DistillManyFaults": ({'faults_total{kind="actors_lost"}': "0x10 0+4x50"}, [(10, False), (30, True)]),
    "DistillBudgetNearlySpent": ({"usd": "0+1x60", "budget_usd": "50x60"}, [(40, False), (50, True)]),
}
QUIET: dict[str, tuple[dict[str, str], list[tuple[int, bool]]]] = {
    "DistillNoProgress": (
        # Tokens go on within a long shard; and a job that waits, or has ended, is not stuck.
        {"running": "1x60", "done": "0x60", "tokens_total": "0+100x60", "waiting": "0x60"},
        [(50, False)],
    ),
    "DistillManyFaults": ({'faults_total{kind="stragglers_duplicated"}': "0+9x60"}, [(50, False)]),
}


@pytest.mark.parametrize(
    ("alert", "case"), [*CASES.items(), *QUIET.items()], ids=[*CASES, *(f"{name} is quiet" for name in QUIET)]
)
def test_alerts_are_raised_when_they_should(
    alert: str, case: tuple[dict[str, str], list[tuple[int, bool]]], tmp_path: Path
) -> None:
    assert {rule["alert"] for rule in alerts()} == CASES.keys()
    told, moments = case
    series = []
    for name, values in told.items():
        base, _, more = name.partition("{")
        tags = ", ".join(filter(None, ('pipeline="adult", stage="capture"', more.rstrip("}"))))
        steady = [part if "+" in part else part.replace("x", "+0x") for part in values.split()]
        series.append({"series": f"{EXPORTED}{base}{{{tags}}}", "values": " ".join(steady)})
    rule = next(rule for rule in alerts() if rule["alert"] == alert)
    tests = []
    for minute, raised in moments:
        test: dict[str, Any] = {"interval": "1m", "input_series": series}
        # Only whether it is raised counts, not what it says: a count of the series that Prometheus keeps of alerts.
        expected = [{"labels": "{}", "value": 1}] if raised else []
        asked = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
        test["promql_expr_test"] = [{"expr": asked, "eval_time": f"{minute}m", "exp_samples": expected}]
        tests.append(test)
    assert rule["annotations"].keys() == {"summary", "description"}
    page = {"rule_files": [str(GRAFANA / "alerts.yaml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(page))
    done = run(tool("promtool"), "test", "rules", str(tmp_path / "tests.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_nodes_are_found() -> None:
    config = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())
    [path] = config["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert path == f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    monitor = yaml.safe_load((GRAFANA / "podmonitor.yaml").read_text())
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    cluster = next(yaml.safe_load_all((INFRA / "kuberay/base/raycluster.yaml").read_text()))
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        named = [port for each in group["template"]["spec"]["containers"] for port in each.get("ports", ())]
        ports = {port["name"]: port["containerPort"] for port in named}
        assert str(ports[endpoint["port"]]) == group["rayStartParams"]["metrics-export-port"]
