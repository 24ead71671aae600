"""Policies for compose files; whether they are compose files at all, docker-compose itself says."""

import re
from collections.abc import Iterator
from typing import Any

from manifests import IMAGE, SECRET_NAME

KEYS = {"postgres_password", "storage_key", "storage_secret", "admin_password", "session_key"}


def compose_complaints(compose: dict[str, Any]) -> list[str]:
    """What our rules say against a compose file that docker-compose takes."""
    found = [f"{name}: {why}" for name, service in compose["services"].items() for why in _of_service(service, compose)]
    for name, secret in compose.get("secrets", {}).items():
        if not str(secret.get("file", "")).startswith("secrets/"):
            found.append(f"the secret {name} is not a file under secrets/, which git ignores")
    if not any(network.get("internal") for network in compose["networks"].values()):
        found.append("no network is internal: the database and the object store would be open to all")
    return found


def _of_service(service: dict[str, Any], compose: dict[str, Any]) -> Iterator[str]:
    if not IMAGE.search(service.get("image", "")):
        yield f"the image {service.get('image')} is not pinned"
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(service.get("user", ""))):
        yield "runs as root"
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
        yield "can write into its image, or keeps rights that it has no use for"
    if "no-new-privileges:true" not in service.get("security_opt", []) or service.get("privileged"):
        yield "may gain rights"
    if "mem_limit" not in service or "cpus" not in service:
        yield "has no limits"
    if "healthcheck" not in service and "build" not in service:
        yield "has no healthcheck"
    yield from _of_secrets(service)
    for port in service.get("ports", []):
        if not re.match(r"^(127\.0\.0\.1|\$\{\w+:-127\.0\.0\.1\}):", str(port)):
            yield f"opens {port} to every network of the machine"
        if set(service.get("networks", [])) <= {n for n, one in compose["networks"].items() if one.get("internal")}:
            yield f"opens {port}, but has an internal network alone"


def _of_secrets(service: dict[str, Any]) -> Iterator[str]:
    for name, value in service.get("environment", {}).items():
        if SECRET_NAME.search(name) and not (name.endswith("_FILE") and str(value).startswith("/run/secrets/")):
            yield f"{name} stands in the open: take it from a file under /run/secrets"
        mounted = str(value).removeprefix("/run/secrets/")
        if str(value).startswith("/run/secrets/") and mounted not in service.get("secrets", []):
            yield f"{name} names the secret {mounted}, which the service isn't given"
