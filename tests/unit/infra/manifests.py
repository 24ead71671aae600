"""Kubernetes manifests: rendered by kustomize, checked against Kubernetes' own schemas, and held to our policies."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import yaml
from ray_fields import ray_complaints
from tools import run, tool

Document = dict[str, Any]
KUBERNETES = "1.34.0"
SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|credential|access_?key|api_?key)")
IMAGE = re.compile(r"^[\w.\-/:]+:[\w.\-]*\d[\w.\-]*$|@sha256:[0-9a-f]{64}$")


def render(folder: Path) -> list[Document]:
    """What ``kubectl apply -k`` would send."""
    return _own(_render(folder))


@cache
def _render(folder: Path) -> list[Document]:
    done = run(tool("kubectl"), "kustomize", str(folder))
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def written(folder: Path) -> list[Document]:
    """The resources that a kustomization lists, as they stand in its files."""
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return _own([document for name in names for document in yaml.safe_load_all((folder / name).read_text())])


def _own(documents: list[Document]) -> list[Document]:
    """A copy in which nothing that YAML's aliases share is shared."""
    return [json.loads(json.dumps(document)) for document in documents]


class Pod(NamedTuple):
    """A pod's template, and which resource of which namespace makes pods of it."""

    owner: str
    namespace: str
    template: Document
    claims: frozenset[str] = frozenset()

    @property
    def spec(self) -> Document:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(documents: list[Document]) -> Iterator[Pod]:
    for document in documents:
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec", {})
        where = document["metadata"].get("namespace", "")
        if kind in ("Deployment", "StatefulSet", "Job"):
            claims = frozenset(one["metadata"]["name"] for one in spec.get("volumeClaimTemplates", []))
            yield Pod(f"{kind} {name}", where, spec["template"], claims)
        cluster = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec", {})}.get(kind, {})
        if cluster:
            yield Pod(f"{kind} {name} head", where, cluster["headGroupSpec"]["template"])
            for group in cluster["workerGroupSpecs"]:
                yield Pod(f"{kind} {name} {group['groupName']}", where, group["template"])
        if kind == "RayJob":
            yield Pod(f"{kind} {name} submitter", where, spec["submitterPodTemplate"])


def schema_complaints(documents: list[Document]) -> list[str]:
    """Where a manifest isn't what Kubernetes, or KubeRay, takes; unknown fields are told of, too."""
    found = []
    for document in documents:
        if document["apiVersion"].startswith("ray.io/"):
            found += ray_complaints(document)
        else:
            found += _refused(document)
    for pod in pods(documents):
        found += [
            f"{pod.owner}: {why}"
            for why in _refused({"apiVersion": "v1", "kind": "PodTemplate", "template": pod.template})
        ]
    return found


def _refused(document: Document) -> list[str]:
    return list(_refusals(json.dumps(document, sort_keys=True)))


@cache
def _refusals(text: str) -> tuple[str, ...]:
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message}",)
    return ()


def policy_complaints(documents: list[Document]) -> list[str]:
    """What our own rules say against manifests that Kubernetes would take."""
    found = [f"{one['kind']} {one['metadata']['name']} holds secrets in the open" for one in documents if _open(one)]
    for pod in pods(documents):
        told = [*_of_pod(pod), *(why for container in pod.containers for why in _of_container(pod, container))]
        found += [f"{pod.owner}: {why}" for why in told]
    return found + _loose(documents) + _dangling(documents)


def _open(document: Document) -> bool:
    if document["kind"] == "ConfigMap":
        texts = document.get("data", {}).values()
        return any(re.search(r"(?im)^\s*[\w.]*(password|secret_?key|token)[\w.]*\s*[:=]\s*\S", text) for text in texts)
    return document["kind"] == "Secret"


def _of_pod(pod: Pod) -> Iterator[str]:
    person = pod.spec.get("securityContext", {})
    if not person.get("runAsNonRoot") or not person.get("runAsUser"):
        yield "may run as root"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "gets a token of Kubernetes' API that it has no use for"
    if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares its node's namespaces"
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for volume in volumes.values():
        if "hostPath" in volume:
            yield f"mounts a folder of the node as {volume['name']}"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"may fill its node's disk through {volume['name']}"


def _of_container(pod: Pod, container: Document) -> Iterator[str]:
    name, safety = container["name"], container.get("securityContext", {})
    if not IMAGE.search(container["image"]):
        yield f"{name}: the image {container['image']} is not pinned"
    if safety.get("runAsNonRoot") is False or safety.get("runAsUser") == 0 or safety.get("privileged"):
        yield f"{name} runs as root"
    if not safety.get("readOnlyRootFilesystem"):
        yield f"{name} can write into its image"
    if safety.get("allowPrivilegeEscalation") is not False or safety.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name} keeps rights that it has no use for"
    resources = container.get("resources", {})
    for unit in ("cpu", "memory"):
        if unit not in resources.get("requests", {}) or unit not in resources.get("limits", {}):
            yield f"{name} has no request or limit of {unit}"
    for variable in container.get("env", []):
        if SECRET_NAME.search(variable["name"]) and "value" in variable:
            yield f"{name}: {variable['name']} stands in the open: take it from a Secret"
    yield from _of_mounts(pod, container)


def _of_mounts(pod: Pod, container: Document) -> Iterator[str]:
    name, mounts = container["name"], container.get("volumeMounts", [])
    known = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    if len({mount["mountPath"] for mount in mounts}) < len(mounts):
        yield f"{name} mounts two volumes at one place"
    for mount in mounts:
        if mount["name"] not in known.keys() | pod.claims:
            yield f"{name} mounts {mount['name']}, which the pod has no volume of"
        if mount["mountPath"] != "/dev/shm" or mount["name"] not in known:
            continue
        folder = known[mount["name"]].get("emptyDir", {})
        limit = container.get("resources", {}).get("limits", {}).get("memory", "0")
        if folder.get("medium") != "Memory":
            yield f"{name}: /dev/shm is not memory"
        elif amount(folder.get("sizeLimit", "0")) >= amount(limit):
            yield f"{name}: /dev/shm may take all of the container's memory"


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number: bytes, or CPUs."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]i?|m)?", str(quantity))
    assert match, quantity
    factors = {None: 1.0, "m": 1e-3, **{u: 1000.0 ** (i + 1) for i, u in enumerate("kMGT")}}
    factors |= {f"{unit}i": 1024.0 ** (i + 1) for i, unit in enumerate("kMGT")}
    return float(match[1]) * factors[match[2]]


def _matches(selector: Document, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def _loose(documents: list[Document]) -> list[str]:
    """Selectors that find no pod, and services whose port no container has."""
    there, found = list(pods(documents)), []
    for document in documents:
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec", {})
        where = document["metadata"].get("namespace", "")
        for selector in _selectors(kind, spec):
            chosen = [pod for pod in there if pod.namespace == where and _matches(selector, pod.labels)]
            if not chosen:
                found.append(f"{kind} {name} selects {selector}, which no pod of the namespace has")
            if kind == "Service":
                ports = {port["name"] for pod in chosen for one in pod.containers for port in one.get("ports", [])}
                wanted = {port["targetPort"] for port in spec["ports"]}
                found += [f"Service {name}: no container has a port {port}" for port in sorted(wanted - ports)]
    return found


def _selectors(kind: str, spec: Document) -> list[Document]:
    if kind == "Service":
        return [spec["selector"]]
    if kind == "PodDisruptionBudget":
        return [spec["selector"]["matchLabels"]]
    return [spec["podSelector"].get("matchLabels", {}), *_peers(spec)] if kind == "NetworkPolicy" else []


def _peers(spec: Document) -> Iterator[Document]:
    """Selectors of pods of the policy's own namespace, among those that it lets in or out to."""
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        for peer in [*rule.get("from", []), *rule.get("to", [])]:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                yield peer["podSelector"].get("matchLabels", {})


def references(documents: list[Document], kind: str) -> set[str]:
    """Names of the Secrets, ConfigMaps, ServiceAccounts or PersistentVolumeClaims that manifests refer to."""
    found: set[str] = set()
    keys = {
        "Secret": {"secretKeyRef": "name", "secretRef": "name", "secret": "secretName", "authOptions": "secretName"},
        "ConfigMap": {"configMapKeyRef": "name", "configMapRef": "name", "configMap": "name"},
        "PersistentVolumeClaim": {"persistentVolumeClaim": "claimName"},
    }.get(kind, {})

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in keys and isinstance(inner, dict) and keys[key] in inner:
                    found.add(inner[keys[key]])
                if kind == "ServiceAccount" and key == "serviceAccountName":
                    found.add(inner)
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(documents)
    return found


EVERYWHERE = {"ConfigMap": {"kube-root-ca.crt"}}
"""What Kubernetes itself puts into each namespace."""


def _dangling(documents: list[Document]) -> list[str]:
    """References to what isn't among the manifests; Secrets are made by hand and never are."""
    found = []
    for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount"):
        there = {one["metadata"]["name"] for one in documents if one["kind"] == kind} | EVERYWHERE.get(kind, set())
        found += [f"there is no {kind} {name}" for name in sorted(references(documents, kind) - there)]
    return found
