"""Which network interface the ranks of a node meet on."""

import psutil

from cluster.trainer import interface


def test_an_interface_is_found_by_its_address() -> None:
    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found)
    )
    assert interface("127.0.0.1") == loopback
    assert interface("203.0.113.77") is None and interface("") is None
    for name, found in psutil.net_if_addrs().items():
        for each in found:
            if "." in each.address:
                assert interface(each.address) == name
