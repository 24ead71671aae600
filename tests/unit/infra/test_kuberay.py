"""The KubeRay manifests: what they are, what they hold, and that each check would tell of a mistake."""

import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import command_complaints
from kustomizations import kustomization_complaints
from manifests import Document, pods, policy_complaints, render, schema_complaints, written
from ray._private import ray_constants
from ray_fields import ray_complaints
from tools import INFRA, ROOT

from distill_jobs.spec import load_job

KUBERAY = INFRA / "kuberay"
FOLDERS = [KUBERAY / "base", *sorted((KUBERAY / "overlays").iterdir())]
CLOUD = [folder for folder in FOLDERS if folder.name.startswith("cloud")]


def ids(folder: Path) -> str:
    return folder.name


def clusters(documents: list[Document]) -> list[Document]:
    """The specs of all Ray clusters that manifests make."""
    found = {"RayCluster": lambda spec: spec, "RayJob": lambda spec: spec["rayClusterSpec"]}
    return [found[one["kind"]](one["spec"]) for one in documents if one["kind"] in found]


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_schemas_and_policies_are_kept(folder: Path) -> None:
    documents = render(folder)
    assert len(clusters(documents)) == 1
    assert schema_complaints(documents) == []
    assert policy_complaints(documents) == []


def test_the_base_as_written_is_sound() -> None:
    """Without kubectl, too."""
    documents = written(KUBERAY / "base")
    assert schema_complaints(documents) == []
    assert policy_complaints(documents) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_all_that_a_kustomization_names_is_there(folder: Path) -> None:
    assert kustomization_complaints(folder) == []


def test_every_file_belongs_to_a_kustomization() -> None:
    for path in KUBERAY.rglob("*.yaml"):
        if path.name != "kustomization.yaml":
            assert path.name in (path.parent / "kustomization.yaml").read_text(), path


def cluster(documents: list[Document]) -> Any:
    return next(one["spec"] for one in documents if one["kind"] == "RayCluster")


def head(documents: list[Document]) -> Any:
    return cluster(documents)["headGroupSpec"]["template"]["spec"]


def group(documents: list[Document]) -> Any:
    return cluster(documents)["workerGroupSpecs"][0]


def of_kind(documents: list[Document], kind: str) -> Any:
    return next(one for one in documents if one["kind"] == kind)


def rename(record: Any, old: str, new: str) -> None:
    record[new] = record.pop(old)


MUTATIONS: dict[str, tuple[Callable[[list[Document]], object], str]] = {
    "a typo of KubeRay's": (lambda d: rename(group(d), "minReplicas", "minReplica"), "minReplica"),
    "a typo in a pod": (lambda d: rename(head(d)["containers"][0], "imagePullPolicy", "imagePolicy"), "imagePolicy"),
    "a typo in a policy": (lambda d: rename(of_kind(d, "NetworkPolicy")["spec"], "ingress", "ingres"), "ingres"),
    "a number as text": (lambda d: group(d).update(maxReplicas="8"), "maxReplicas"),
    "more than the most": (lambda d: group(d).update(replicas=99), "between its least"),
    "an option Ray hasn't": (lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update(cpus="0"), "no --cpus"),
    "unquoted resources": (
        lambda d: group(d)["rayStartParams"].update(resources='{"teacher": 1}'),
        "is not JSON",
    ),
    "no token": (lambda d: cluster(d).pop("authOptions"), "anybody who reaches a port"),
    "a second group of a name": (lambda d: group(d).update(groupName="cpu"), "same name"),
    "restarts": (lambda d: head(d).update(restartPolicy="Always"), "must not restart"),
    "root": (lambda d: head(d)["securityContext"].update(runAsNonRoot=False), "may run as root"),
    "root in a container": (lambda d: head(d)["containers"][0]["securityContext"].update(runAsUser=0), "runs as root"),
    "latest": (lambda d: head(d)["containers"][0].update(image="distill-jobs:latest"), "not pinned"),
    "no tag": (lambda d: head(d)["containers"][0].update(image="distill-jobs"), "not pinned"),
    "no limit": (lambda d: head(d)["containers"][0]["resources"].pop("limits"), "limit of memory"),
    "capabilities": (lambda d: head(d)["containers"][0]["securityContext"].pop("capabilities"), "keeps rights"),
    "a writable image": (
        lambda d: head(d)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
        "write into its image",
    ),
    "a secret in the open": (
        lambda d: head(d)["containers"][0]["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        "stands in the open",
    ),
    "a Secret": (
        lambda d: d.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}),
        "holds secrets in the open",
    ),
    "a token of Kubernetes": (lambda d: head(d).pop("automountServiceAccountToken"), "a token of Kubernetes"),
    "an unknown account": (lambda d: head(d).update(serviceAccountName="other"), "no ServiceAccount other"),
    "an unknown volume": (lambda d: head(d)["volumes"].pop(0), "which the pod has no volume of"),
    "shared memory on disk": (lambda d: head(d)["volumes"][2]["emptyDir"].pop("medium"), "not memory"),
    "too much shared memory": (lambda d: head(d)["volumes"][2]["emptyDir"].update(sizeLimit="64Gi"), "may take all"),
    "a boundless folder": (lambda d: head(d)["volumes"][0]["emptyDir"].pop("sizeLimit"), "fill its node's disk"),
    "a folder of the node": (
        lambda d: head(d)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "a folder of the node",
    ),
    "a budget for nobody": (
        lambda d: of_kind(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update({"a": "b"}),
        "which no pod",
    ),
    "a policy for nobody": (
        lambda d: of_kind(d, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].update({"a": "b"}),
        "which no pod",
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_manifest_is_told_of(what: str) -> None:
    change, said = MUTATIONS[what]
    documents = written(KUBERAY / "base")
    change(documents)
    told = schema_complaints(documents) + policy_complaints(documents)
    assert any(said in why for why in told), told


def job_of(documents: list[Document]) -> Any:
    return of_kind(documents, "RayJob")["spec"]


BROKEN_JOBS: list[tuple[Callable[[list[Document]], object], str]] = [
    (lambda d: rename(job_of(d), "entrypoint", "entryPoint"), "entryPoint"),
    (lambda d: job_of(d).update(entrypoint="a && b"), "would part the command"),
    (lambda d: job_of(d).update(shutdownAfterJobFinishes=False), "needs shutdownAfterJobFinishes"),
    (lambda d: job_of(d).update(submissionMode="HTTPMode"), "for K8sJobMode alone"),
    (lambda d: job_of(d).update(backoffLimit=-1), "backoffLimit"),
    (lambda d: job_of(d)["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
    (lambda d: of_kind(d, "RayJob").update(apiVersion="ray.io/v1alpha1"), "there is no RayJob in ray.io/v1alpha1"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN_JOBS)
def test_a_broken_job_is_told_of(change: Callable[[list[Document]], object], said: str) -> None:
    documents = render(KUBERAY / "overlays" / "kind-job")
    change(documents)
    told = [why for one in documents if one["kind"] == "RayJob" for why in ray_complaints(one)]
    assert any(said in why for why in told), told


BROKEN_KUSTOMIZATIONS = [
    ("overlays/cloud", "path: pools.yaml", "path: pool.yaml", "no pool.yaml"),
    ("overlays/cloud", "kind: RayCluster", "kind: RayClusters", "isn't there"),
    ("overlays/cloud-job", "kind: RayJob", "kind: RayCluster", "isn't there"),  # the component has taken it away
    ("overlays/kind", "../../base", "../../bass", "no ../../bass"),
    ("base", "raycluster.yaml", "rayclusters.yaml", "no rayclusters.yaml"),
    ("base", "resources:", "resource:", "unknown key resource"),
]


@pytest.mark.parametrize(("folder", "old", "new", "said"), BROKEN_KUSTOMIZATIONS)
def test_a_broken_kustomization_is_told_of(tmp_path: Path, folder: str, old: str, new: str, said: str) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / folder / "kustomization.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert any(said in why for why in kustomization_complaints(path.parent))


def test_versions_are_those_of_the_lock_and_the_project() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for folder in FOLDERS:
        documents = render(folder)
        assert {f"ray=={spec['rayVersion']}" for spec in clusters(documents)} <= set(lock.splitlines())
        for pod in pods(documents):
            assert all(re.search(rf":{re.escape(version)}-(cpu|cuda)$", one["image"]) for one in pod.containers)


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_nothing_but_the_head_stays_when_nothing_runs(folder: Path) -> None:
    [spec] = clusters(render(folder))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pools = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert pools.keys() == {"teacher", "student", "cpu"}
    if folder.name != "cloud-gang":  # of which nothing stays: it is a job's own
        assert spec["enableInTreeAutoscaling"] is True
        assert all(group["minReplicas"] == 0 for group in pools.values())


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_ray_is_told_of_a_pods_end_while_there_is_time(folder: Path) -> None:
    [spec] = clusters(render(folder))
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        assert hasattr(ray_constants, name)
        [seconds] = [int(one["value"]) for one in container["env"] if one["name"] == name]
        assert 10 <= pod["terminationGracePeriodSeconds"] - seconds < seconds


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_prometheus_finds_every_ray_pod_and_may_come_in(folder: Path) -> None:
    documents = render(folder)
    [monitored] = yaml.safe_load((INFRA / "grafana" / "podmonitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    [spec] = clusters(documents)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert str(ports[monitored["port"]]) == group["rayStartParams"]["metrics-export-port"]
        policies = [one["spec"] for one in documents if one["kind"] == "NetworkPolicy"]
        let_in = {port["port"] for policy in policies for rule in policy["ingress"] for port in rule.get("ports", [])}
        assert ports[monitored["port"]] in let_in


@pytest.mark.parametrize("folder", CLOUD, ids=ids)
def test_in_a_cloud_pools_have_their_gpus_and_bear_spot(folder: Path) -> None:
    [spec] = clusters(render(folder))
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        has_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert has_gpu == (group["groupName"] != "cpu")
        assert has_gpu == pod["containers"][0]["image"].endswith("-cuda")
        borne = {one["key"] for one in pod["tolerations"]}
        assert borne == {"distill-jobs/spot"} | ({"nvidia.com/gpu"} if has_gpu else set())
        assert pod["nodeSelector"]
    assert "tolerations" not in spec["headGroupSpec"]["template"]["spec"]


def test_on_a_laptop_no_gpu_is_asked_for() -> None:
    for name in ("kind", "kind-job"):
        for pod in pods(render(KUBERAY / "overlays" / name)):
            assert all("nvidia.com/gpu" not in container["resources"]["limits"] for container in pod.containers)


def test_what_jobs_run_is_there() -> None:
    """Commands of the command line, with options it has, on specs that are there and parse."""
    for folder in FOLDERS:
        for job in (one for one in render(folder) if one["kind"] == "RayJob"):
            assert command_complaints(job["spec"]["entrypoint"]) == []
    example = re.search(r"distill_jobs/examples/\w+.yaml", (KUBERAY / "overlays/kind-job/entrypoint.yaml").read_text())
    assert example
    load_job(str(ROOT / example[0]), ["workdir=/work/runs/digits", "data.train=/work/demo/digits/digits.parquet"])


def test_the_jobs_spec_fits_the_pools_it_is_for() -> None:
    job = load_job(str(KUBERAY / "overlays" / "cloud-job" / "spec.yaml"))
    for name in ("cloud-job", "cloud-gang"):
        [spec] = clusters(render(KUBERAY / "overlays" / name))
        pools = {group["groupName"]: group for group in spec["workerGroupSpecs"]}

        def room(pool: str, cpus: float, gpus: float, pools: Any = pools) -> int:
            has = pools[pool]["template"]["spec"]["containers"][0]["resources"]["limits"]
            fits = min(int(float(has["cpu"]) / cpus), int(float(has["nvidia.com/gpu"]) / gpus))
            return fits * int(pools[pool]["maxReplicas"])

        for kind in job.capture.crews:
            assert all(f'\\"{unit}\\"' in pools["teacher"]["rayStartParams"]["resources"] for unit in kind.resources)
            assert kind.least <= room("teacher", kind.cpus_per_actor, kind.gpus_per_actor)
        train = job.student.train
        assert train.most_workers <= room("student", train.cpus_per_worker, train.gpus_per_worker)
