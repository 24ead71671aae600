"""Kustomizations: what they name is there. kubectl is silent about a patch that finds nothing to change."""

from pathlib import Path
from typing import Any

import yaml

Names = frozenset[tuple[str, str]]
KUSTOMIZATION = {
    "apiVersion", "kind", "namespace", "resources", "components", "patches", "images", "replacements", "transformers",
    "generatorOptions", "configMapGenerator", "labels",
}  # fmt: skip


def kustomization_complaints(folder: Path) -> list[str]:
    """What a kustomization names and isn't there: files, and the resources that patches are for."""
    return _accumulate(folder)[1]


def _accumulate(folder: Path, before: Names = frozenset()) -> tuple[Names, list[str]]:
    """The kinds and names that a folder makes of those ``before`` it, and complaints; in the order of kustomize."""
    here = yaml.safe_load((folder / "kustomization.yaml").read_text())
    names, found = before, [f"{folder.name}: unknown key {key}" for key in here.keys() - KUSTOMIZATION]
    for name in here.get("resources", []):
        place = (folder / name).resolve()
        if not place.exists():
            found.append(f"{folder.name}: no {name}")
        elif place.is_dir():
            inner, told = _accumulate(place)
            names, found = names | inner, found + told
        else:
            names |= {(one["kind"], one["metadata"]["name"]) for one in yaml.safe_load_all(place.read_text())}
    for name in here.get("components", []):
        place = (folder / name).resolve()
        names, told = _accumulate(place, names) if place.exists() else (names, [f"{folder.name}: no {name}"])
        found += told
    for generator in here.get("configMapGenerator", []):
        names |= {("ConfigMap", generator["name"])}
        files = [one.rpartition("=")[2] for one in generator.get("files", [])]
        found += [f"{folder.name}: no {name}" for name in files if not (folder / name).exists()]
    for patch in here.get("patches", []):
        found += _unmet(folder, patch, names)
    for name in here.get("transformers", []):
        transformer = yaml.safe_load((folder / name).read_text())
        if "$patch: delete" in transformer.get("patch", ""):
            names -= {(transformer["target"]["kind"], transformer["target"]["name"])}
    return names, found


def _unmet(folder: Path, patch: dict[str, Any], names: Names) -> list[str]:
    place = folder / patch["path"]
    if not place.exists():
        return [f"{folder.name}: no {patch['path']}"]
    target = patch.get("target")
    if target is None:
        content = yaml.safe_load(place.read_text())
        target = {"kind": content["kind"], "name": content["metadata"]["name"]}
    if (target["kind"], target["name"]) not in names:
        return [f"{folder.name}: the patch {patch['path']} is for {target['kind']} {target['name']}, which isn't there"]
    return []
