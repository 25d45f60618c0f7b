"""Which nodes a node keeps a line to. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.cluster.membership.records import View

MESH_MAX = 64
"""Up to so many nodes everybody has a line to everybody."""


def wanted(view: View, me: str) -> dict[str, str]:
    """The addresses, by node, to which ``me`` keeps lines.

    With many nodes: to the leader and the node of rank 0, who have lines to all, and to both neighbours in a ring of all
    members, so that two at least see each node's end.
    """
    addresses = {member.node: member.info.address for member in view.members if member.info.address}
    nodes = sorted(addresses)
    if len(nodes) <= MESH_MAX or me in _centres(view):
        return {node: address for node, address in addresses.items() if node != me}
    near = {*_centres(view), *_neighbours(nodes, me)}
    return {node: addresses[node] for node in near if node in addresses and node != me}


def _centres(view: View) -> set[str]:
    found = {view.leader.node} if view.leader is not None else set()
    return found | {view.epoch.root} if view.epoch is not None else found


def _neighbours(nodes: Sequence[str], me: str) -> set[str]:
    if me not in nodes:
        return set()
    at = nodes.index(me)
    return {nodes[at - 1], nodes[(at + 1) % len(nodes)]}
