"""Metrics as they leave a real Ray: scraped from its endpoint, and all panels and alerts by a real Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import ray
import yaml

from cluster.files import Folder
from cluster.metrics import EXPORTED, METRICS, Publisher, exported
from cluster.session import Session
from cluster.shards import Crew, map_shards
from cluster.standing import FAULTS, STANDING
from distill_jobs import live
from distill_jobs.live import Live, show_training
from distill_jobs.progress import Progress

GRAFANA = Path(__file__).parents[2] / "infra" / "grafana"


class Slow:
    def run(self, shard: int) -> int:
        time.sleep(0.15)
        return shard


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with Session(cpus=2) as running:
            yield running


def work(session: Session, progress: Progress, shards: int) -> None:
    """A map that tells all that can be told."""

    def on_result(shard: int, _: int) -> None:
        progress.advance(shard + 1, shards, "")
        STANDING.add("tokens", 100)
        STANDING.show("store_bytes", 1000.0 * shard)
        values = {"loss": 1 / (shard + 1), "step_seconds": 0.1, "tokens_per_second": 50.0, "waiting": 0.01}
        show_training("student/0", shard, values, "spike" if shard == 5 else None)

    map_shards(session, Crew(Slow, most=2), list(range(shards)), on_result)


def endpoint() -> str:
    node = ray.nodes()[0]
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def scraped() -> set[str]:
    """The names of our metrics at Ray's endpoint."""
    with urlopen(f"http://{endpoint()}/metrics", timeout=10) as answer:
        return set(re.findall(rf"^({EXPORTED}\w+)\{{", answer.read().decode(), re.M))


def everything() -> set[str]:
    return {full for name in METRICS for full in exported(name)}


@pytest.fixture
def prometheus(session: Session, tmp_path: Path) -> Iterator[str]:  # noqa: ARG001  # Ray has to run
    """A real Prometheus with the configuration that is shipped, but for its pace and Ray's file of nodes."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("this machine has no prometheus")
    config = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    nodes = tmp_path / "nodes.json"
    nodes.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [endpoint()]}]))
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(nodes)]
    shutil.copy(GRAFANA / "alerts.yaml", tmp_path)
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    yield address
    running.terminate()
    running.wait(20)


def query(address: str, text: str) -> list[Any]:
    with urlopen(f"http://{address}/api/v1/query?{urlencode({'query': text})}", timeout=10) as answer:
        page = json.load(answer)
    assert page["status"] == "success", page
    return list(page["data"]["result"])


def queries() -> dict[str, str]:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}
    return {title: text.replace("$pipeline", ".*") for title, text in found.items()}


@pytest.mark.slow
def test_what_is_declared_is_at_the_endpoint_and_fills_every_panel(
    session: Session, prometheus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_EVERY_SECONDS", 0.5)
    with Live("scraped", Folder(str(tmp_path / "run")), lambda: 1.9, 2.0) as telling:
        progress = Progress("capture")
        telling.follow(progress)
        for kind in FAULTS:
            STANDING.survived(kind)
        work(session, progress, 60)
        STANDING.survived("actors_lost", 30)
        work(session, progress, 120)
        end = time.monotonic() + 60
        while missing := everything() - scraped():
            assert time.monotonic() < end, missing
            time.sleep(1)
        while empty := [title for title, text in queries().items() if not query(prometheus, text)]:
            assert time.monotonic() < end, empty
            time.sleep(1)
        kinds = {each["metric"]["kind"] for each in query(prometheus, f"{EXPORTED}faults_total")}
        assert kinds >= FAULTS.keys()
        [spent] = query(prometheus, 'ray_distill_usd{pipeline="scraped", stage="capture"}')
        assert float(spent["value"][1]) == 1.9
        while {"DistillBudgetNearlySpent", "DistillManyFaults"} - {
            each["metric"]["alertname"] for each in query(prometheus, 'ALERTS{alertstate="firing"}')
        }:
            assert time.monotonic() < end, query(prometheus, "ALERTS")
            time.sleep(1)
    end = time.monotonic() + 20
    while query(prometheus, f'{EXPORTED}running{{pipeline="scraped"}} == 1'):
        assert time.monotonic() < end, "it is over"
        time.sleep(1)


@pytest.mark.slow
def test_metrics_never_harm_the_work(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.resources()
    publisher = Publisher("harmless")
    monkeypatch.setattr(ray, "nodes", lambda: 1 / 0)
    publisher.publish()
    assert not publisher._made
    monkeypatch.undo()
    monkeypatch.setattr(Publisher, "_metric", lambda *_: 1 / 0)
    publisher.publish()
    monkeypatch.undo()
    publisher.close()
    assert publisher._made, "it goes on once it can"
    publisher._made.clear()
    publisher.publish()
    assert not publisher._made, "nothing touches Ray any more"


def test_without_ray_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ray.is_initialized():
        publisher = Publisher("nowhere")
        publisher.publish()
        publisher.close()
        assert not publisher._made
    monkeypatch.setenv("DISTILL_METRICS", "0")
    off = Publisher("off")
    off.publish()
    assert not off._made
