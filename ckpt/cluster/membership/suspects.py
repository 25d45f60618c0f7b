"""Whose death is certain enough. Pure: the words of witnesses in, the nodes to be taken out and why.

One witness may be cut off itself. Two that agree are enough, since being wrong costs an epoch and no state. Where two halves of
a job suspect each other, taking out everybody that has two accusers would leave nobody: so the most accused goes first, and
with it goes its own word.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt.cluster.membership.records import View


def confirmed(view: View, witnesses_min: int) -> Mapping[str, str]:
    """The members that enough others suspect, and why. Words of nodes that are no members, or are taken out, don't count.

    O(suspicions * nodes taken out). Of equally accused nodes a leader goes last, else the one with the greatest id first.
    """
    accusers: dict[str, dict[str, str]] = {}
    for one in view.suspicions:
        if one.node in view.by_node and one.by in view.by_node and one.node != one.by:
            accusers.setdefault(one.node, {})[one.by] = one.why
    leader = view.leader.node if view.leader is not None else ""
    out: dict[str, str] = {}
    while accusers:
        node = max(accusers, key=lambda name: (len(accusers[name]), name != leader, name))
        words = accusers.pop(node)
        if len(words) < witnesses_min:
            break
        out[node] = _why(words)
        for of in [of for of, by in accusers.items() if node in by]:
            accusers[of].pop(node)
            if not accusers[of]:
                accusers.pop(of)
    return out


def _why(words: Mapping[str, str]) -> str:
    first = min(words)
    return f"suspected by {len(words)} nodes, as {first} says: {words[first]}"


def doubted(view: View, witnesses_min: int) -> tuple[str, ...]:
    """Members that somebody suspects, but too few."""
    out = confirmed(view, witnesses_min)
    words = {one.node for one in view.suspicions if one.by in view.by_node and one.by not in out and one.by != one.node}
    return tuple(sorted(node for node in words if node in view.by_node and node not in out))
