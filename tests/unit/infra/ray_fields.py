"""KubeRay's own resources: their fields as its definitions have them (ray.io/v1), and rules that its operator enforces.

Only what we use, so that a field of KubeRay's that is new to us has to be put down here first. Pod templates are left
to Kubernetes' schemas.
"""

import json
import shlex
from functools import cache
from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
WHETHER: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
ANY: Schema = {}
TEMPLATE: Schema = {"type": "object", "required": ["spec"]}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def record(*required: str, **fields: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": fields, "additionalProperties": False}


AUTOSCALER = record(
    version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    resources=ANY,
    securityContext=ANY,
    volumeMounts={"type": "array"},
    env={"type": "array"},
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
)
HEAD = record(
    "template",
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
WORKERS = record(
    "groupName", "minReplicas", "maxReplicas", "template",
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT, idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS, template=TEMPLATE,
)  # fmt: skip
CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record(mode=one_of("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=WHETHER,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = record(
    entrypoint=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=WHETHER,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    suspend=WHETHER,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=TEMPLATE,
)


def ray_complaints(document: dict[str, Any]) -> list[str]:
    """What is wrong with a RayCluster or a RayJob."""
    known = {"RayCluster": CLUSTER, "RayJob": JOB}.get(document["kind"])
    if document["apiVersion"] != "ray.io/v1" or known is None:
        return [f"there is no {document['kind']} in {document['apiVersion']}"]
    whole = record("apiVersion", "kind", "metadata", "spec", apiVersion=TEXT, kind=TEXT, metadata=ANY, spec=known)
    errors = jsonschema.Draft202012Validator(whole).iter_errors(document)
    found = [f"{document['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
    if found:
        return found
    spec = document["spec"]
    if document["kind"] == "RayCluster":
        return _of_cluster(spec)
    return _of_job(spec) + _of_cluster(spec["rayClusterSpec"])


def _of_job(spec: dict[str, Any]) -> list[str]:
    found = []
    if not spec.get("shutdownAfterJobFinishes"):
        found += [
            f"{key} needs shutdownAfterJobFinishes" for key in ("ttlSecondsAfterFinished", "suspend") if spec.get(key)
        ]
    if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode" and "submitterPodTemplate" in spec:
        found.append("submitterPodTemplate is for K8sJobMode alone")
    # KubeRay pastes it into a shell of the submitter's as it is.
    words = shlex.shlex(spec.get("entrypoint", ""), posix=True, punctuation_chars=True)
    if any(set(word) <= set("();<>|&") for word in words):
        found.append("entrypoint: the submitter's shell would part the command: put it into bash -c '…'")
    if "rayClusterSpec" not in spec:
        found.append("there is no rayClusterSpec to run on")
    return found


def _of_cluster(spec: dict[str, Any]) -> list[str]:
    found, groups = [], spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) != len(names):
        found.append("two worker groups have the same name")
    for group in groups:
        replicas = group.get("replicas", 0)
        if not group["minReplicas"] <= replicas <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: {replicas} replicas are not between its least and its most")
    for group in [spec["headGroupSpec"], *groups]:
        who, starts = group.get("groupName", "head"), group.get("rayStartParams", {})
        found += [f"{who}: ray start has no --{name}" for name in sorted(starts.keys() - _options())]
        found += _of_resources(who, starts.get("resources"))
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if spec.get("enableInTreeAutoscaling") and policy != "Never":
            found.append(f"{who}: the autoscaler replaces pods, which must not restart by themselves")
        if spec.get("authOptions", {}).get("mode") != "token":
            found.append(f"{who}: anybody who reaches a port may run code: authOptions.mode is not token")
    return found


def _of_resources(who: str, text: str | None) -> list[str]:
    """KubeRay puts the text into a shell's command line as it is: quoted once for the shell, once for JSON."""
    if text is None:
        return []
    try:
        [word] = shlex.split(text)
        told = json.loads(word)
        return (
            []
            if all(isinstance(amount, int | float) for amount in told.values())
            else [f"{who}: resources are numbers"]
        )
    except ValueError:
        return [f"{who}: rayStartParams.resources is not JSON in the shell's quotes: {text}"]


@cache
def _options() -> frozenset[str]:
    """The options that ``ray start`` really has."""
    from ray.scripts.scripts import start

    return frozenset(word.removeprefix("--") for option in start.params for word in option.opts)
