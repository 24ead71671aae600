"""Joining a cluster that runs already, from another process; and a cluster that isn't there."""

import json
import subprocess
import sys

import pytest
import ray

from cluster.errors import ResourceError
from cluster.session import Session

_GUEST = """
import json, sys
from cluster.gang import Gang, run_gang
from cluster.session import Session
from cluster.shards import Crew, map_shards

class Double:
    def run(self, shard):
        return 2 * shard

def both(rank, argument):
    rank.report({"rank": rank.rank})
    return argument + rank.world_size

found, reports = {}, []
with Session(address=sys.argv[1]) as session:
    map_shards(session, Crew(Double), [1, 2], found.__setitem__)
    value, _ = run_gang(session, both, 40, Gang(workers=2), reports.append)
    seen = {"embedded": session.embedded, "cpus": session.resources()["CPU"]}
print(json.dumps(seen | {"found": found, "value": value, "reports": reports}))
"""


@pytest.mark.slow
def test_a_guest_joins_works_and_leaves(session: Session) -> None:
    address = ray.get_runtime_context().gcs_address
    guest = subprocess.run(
        [sys.executable, "-c", _GUEST, address], capture_output=True, text=True, timeout=200, check=False
    )
    assert guest.returncode == 0, guest.stderr
    assert json.loads(guest.stdout) == {
        "embedded": False,
        "cpus": 2.0,
        "found": {"1": 2, "2": 4},
        "value": 42,
        "reports": [{"rank": 0}],
    }
    assert guest.stderr == ""
    assert session.resources()["CPU"] == 2.0


def test_the_embedded_cluster_says_what_it_has(session: Session) -> None:
    assert session.embedded and session.accelerator() is None
    session.require({"work": [(2, {"CPU": 1})]})
    session.require({"work": [(4, {"CPU": 0.5})]})
    with pytest.raises(
        ResourceError, match=r"work asks for 1 worker of 2\.5 CPU \(2\.5 in all\), but the cluster has 2"
    ):
        session.require({"work": [(1, {"CPU": 2.5})]})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    with pytest.raises(ResourceError, match=f"no Ray cluster at {address}: ConnectionRefusedError"):
        Session(address=address).__enter__()
