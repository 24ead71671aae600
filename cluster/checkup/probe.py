"""Questions that are asked in a process of its own, so that a broken torch or Ray breaks nothing else:
``python -m cluster.checkup.probe torch``. The request comes as JSON on standard input, and the answer is its last line.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

# Seconds where a machine has nothing else to do; one that is busy is no reason to call Ray broken.
_SECONDS = 100.0

Values = dict[str, Any]


def ask(what: str, request: Mapping[str, Any], seconds: float = _SECONDS) -> tuple[Values, str]:
    """The answer, and in a sentence why there is none."""
    command = [sys.executable, "-m", "cluster.checkup.probe", what]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"it has not come up within {seconds:.0f} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            return dict(json.loads(lines[-1])), ""
        except ValueError:
            pass
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    ended = f"its process was ended by signal {-done.returncode}" if done.returncode < 0 else "it says nothing"
    return {}, said[-1].strip()[:300] if said and done.returncode >= 0 else ended


def torch_(_: Values) -> Values:
    """Torch's version, the CUDA it is built with, and the devices it sees."""
    import torch

    found: Values = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": [], "error": ""}
    if torch.version.cuda is None:
        return found
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            # From 8.0 on in hardware; torch's own question says yes where it is emulated, too.
            found["devices"].append({"name": about.name, "bytes": about.total_memory, "bf16": about.major >= 8})
    except (RuntimeError, AssertionError) as error:
        found["error"] = " ".join(str(error).split())
    return found


def ray_(request: Values) -> Values:
    """Start or join Ray; its version, its nodes, and what is wrong with them for the packages and needs asked of."""
    import ray

    from cluster.preflight import Request, nodes_lacking
    from cluster.session import Session

    with Session(request["address"], request["cpus"], request["gpus"]) as session:
        asked = Request("", None, {}, request["needs"], request["packages"], request["python"], None, "")
        lacks = {what: session.lacks([(count, held) for count, held in needs]) for what, needs in asked.needs.items()}
        return {
            "version": ray.__version__,
            "nodes": sum(bool(node["Alive"]) for node in ray.nodes()),
            "resources": session.resources(),
            "grows": session.grows,
            "lacks": {what: told for what, told in lacks.items() if told},
            "problems": [] if session.embedded else nodes_lacking(asked, ""),
        }


ASK: dict[str, Callable[[Values], Values]] = {"torch": torch_, "ray": ray_}


def main() -> None:
    """Answer one question."""
    from cluster.errors import ClusterError

    try:
        answer = ASK[sys.argv[1]](json.load(sys.stdin))
    except ClusterError as error:
        sys.exit(str(error))
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
