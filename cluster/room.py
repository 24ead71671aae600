"""Whether there is room on nodes for the workers that are asked for: arithmetic, wherever they are known from."""

from collections.abc import Mapping, Sequence

ACCELERATOR = "accelerator_type:"
_REMEDY = "ask for fewer, or use a larger cluster"

# So many workers, and what each of them holds by Ray's names.
Need = tuple[int, Mapping[str, float]]
# What a node has in all, by Ray's names.
Node = Mapping[str, float]


def lacking(nodes: Sequence[Node], needs: Sequence[Need]) -> str | None:
    """Why the nodes, were they idle, have no room for all workers together; None when they have."""
    for unit in dict.fromkeys(name for _, held in needs for name in held):
        have = sum(node.get(unit, 0.0) for node in nodes)
        wants = [(count, held[unit]) for count, held in needs if count and held.get(unit)]
        total = sum(count * each for count, each in wants)
        if total > have + 1e-6 and not unit.startswith(ACCELERATOR):
            asked = " and ".join(f"{_workers(count)} of {each:g} {unit}" for count, each in wants)
            return f"asks for {asked} ({total:g} in all), but the cluster has {have:g}: {_REMEDY}"
    for count, held in needs:
        fitting = room(nodes, held)
        if count > fitting:
            each = " and ".join(f"{amount:g} {unit}" for unit, amount in held.items() if amount)
            return f"asks for {_workers(count)} of {each}, but the cluster's nodes have room for {fitting}: {_REMEDY}"
    return None


def room(nodes: Sequence[Node], held: Mapping[str, float]) -> int:
    """For how many workers that hold so much the nodes have room, were they idle."""
    return sum(_on(node, held) for node in nodes)


def _workers(count: int) -> str:
    return f"{count} {'worker' if count == 1 else 'workers'}"


def _on(node: Node, held: Mapping[str, float]) -> int:
    """For how many workers an idle node has room."""
    return int(min(((node.get(unit, 0.0) + 1e-6) / amount for unit, amount in held.items() if amount), default=1 << 30))
