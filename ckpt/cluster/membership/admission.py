"""Which members are nodes of this job: whether they proved its secret, and whether their stores and
options are those of the others. Pure.

Each node says, when it joins, what all nodes must share. A member that says something else gets no
ranks: it would make snapshots that nobody can read, or train another job's ranks from the start. A
member that no connection has proved gets none either: it may not know the secret, and nobody could
hear its ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.cluster.membership.records import TEXT_CHARS_MAX, Member, NodeInfo, View

# ---- what a node says of itself

STORES_CAPABILITY = "stores="
LOG_CAPABILITY = "log="
OPTIONS_CAPABILITY = "options="
CAPTURE_CAPABILITY = "captures="
"""Prefixes of the capabilities that carry a ``SharedFacts``."""

NO_LOG = "none"
"""The log id of a node that looked, and found no log at its stores."""

_DIGEST_CHARS = 16
NAMED_MAX = 5
"""How many nodes a text names."""


@dataclass(frozen=True, slots=True)
class SharedFacts:
    """What all nodes of a job must share, as one of them says it; empty texts: it did not say.

    ``stores`` begins with a digest of all addresses; the rest of it is for people. ``log_id``: of
    the log that it found at its stores as it joined, or ``NO_LOG``. ``options``: how the job is
    made, as ``name=value`` words. ``capture_rule``: what decides when all ranks capture, alike;
    apart from the options, because releases that do not say it compare these as a whole.
    """

    stores: str = ""
    log_id: str = ""
    options: str = ""
    capture_rule: str = ""

    @property
    def shown_stores(self) -> str:
        """The addresses, for people."""
        return self.stores[_DIGEST_CHARS + 1 :]

    def capabilities(self) -> tuple[str, ...]:
        """As a node's record carries them."""
        texts = (
            (STORES_CAPABILITY, self.stores),
            (LOG_CAPABILITY, self.log_id),
            (OPTIONS_CAPABILITY, self.options),
            (CAPTURE_CAPABILITY, self.capture_rule),
        )
        return tuple(f"{prefix}{text}"[:TEXT_CHARS_MAX] for prefix, text in texts if text)


def shared_facts(
    stores: Sequence[str], *, log_id: str, options: Mapping[str, object], capture_rule: str = ""
) -> SharedFacts:
    """What a node with these stores says. The order of stores does not matter.

    Long addresses are cut for people, never in the digest. Passwords in URLs are left out.
    """
    digest = hashlib.sha256("\0".join(sorted(stores)).encode(errors="surrogateescape"))
    shown = ", ".join(_shown(address) for address in stores)
    words = " ".join(f"{name}={value}" for name, value in options.items())
    return SharedFacts(
        f"{digest.hexdigest()[:_DIGEST_CHARS]} {shown}",
        log_id,
        _printable(words),
        _printable(capture_rule),
    )


def facts_of(info: NodeInfo) -> SharedFacts:
    """What a node says; nothing if its release does not."""
    found = {}
    prefixes = (STORES_CAPABILITY, LOG_CAPABILITY, OPTIONS_CAPABILITY, CAPTURE_CAPABILITY)
    for text in info.capabilities:
        for prefix in prefixes:
            if text.startswith(prefix):
                found[prefix] = text.removeprefix(prefix)
    return SharedFacts(*(found.get(prefix, "") for prefix in prefixes))


def _shown(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if not separator:
        return _printable(address)
    authority, slash, path = rest.partition("/")
    return _printable(f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- who fits whom


def misfit(first: Member, other: Member) -> str:
    """Why ``other`` can't be a node of the job of ``first``; "" if it can.

    Logs decide where both are known. The one that joined earlier may have looked before the log
    was made; so only a log that was there before can be missed by a later one. Where a log is not
    known, addresses must be equal.
    """
    a, b = facts_of(first.info), facts_of(other.info)
    later = first.joined_revision <= other.joined_revision
    if a.options and b.options and a.options != b.options:
        return f"nodes of one job have different options. {_sides(first, other, 'options')}"
    if a.capture_rule and b.capture_rule and a.capture_rule != b.capture_rule:
        return f"nodes of one job have different options. {_sides(first, other, 'capture rule')}"
    known = [log for log in (a.log_id, b.log_id) if log not in ("", NO_LOG)]
    older, newer = (a, b) if later else (b, a)
    missed = newer.log_id == NO_LOG and older.log_id not in ("", NO_LOG)
    if missed or (len(known) == 2 and known[0] != known[1]):
        return (
            f"nodes of one job see different stores. {_sides(first, other, 'log')}; give all of "
            "them the same stores, which every node can reach under its address"
        )
    if len(known) < 2 and a.stores and b.stores and not _same_stores(a, b):
        return (
            f"nodes of one job have different stores. {_sides(first, other, 'stores')}; give all "
            "of them the same, by absolute paths or URLs; another job needs another --rdzv-id"
        )
    return ""


def _same_stores(a: SharedFacts, b: SharedFacts) -> bool:
    return a.stores[:_DIGEST_CHARS] == b.stores[:_DIGEST_CHARS]


def _sides(first: Member, other: Member, what: str) -> str:
    return " ".join(_side(member, what) for member in (first, other))


def _side(member: Member, what: str) -> str:
    facts = facts_of(member.info)
    match what:
        case "options":
            said = facts.options
        case "capture rule":
            said = facts.capture_rule
        case "log":
            said = f"log {facts.log_id or 'unknown'} at {facts.shown_stores}"
        case _:
            said = facts.shown_stores
    return f"{member.node}=({said})"


def reference_member(view: View, *, ended: bool = False) -> Member | None:
    """The member that all others are compared with: the first that joined, of those that hold
    ranks if any of them lives. ``ended``: the view's epoch is the end of a job."""
    return min(
        _rank_holders(view, ended=ended) or view.members,
        key=lambda member: (member.joined_revision, member.node),
        default=None,
    )


def is_running(view: View, *, ended: bool = False) -> bool:
    """Whether a node lives that holds ranks in the view's epoch."""
    return bool(_rank_holders(view, ended=ended))


def _rank_holders(view: View, *, ended: bool) -> list[Member]:
    if view.epoch is None or ended:
        return []
    return [view.by_node[place.node] for place in view.epoch.places if place.node in view.by_node]


def awaited_nodes(
    view: View,
    me: str,
    *,
    proved: AbstractSet[str],
    nodes_min: int,
    ended: bool,
    last_end: str = "",
) -> str:
    """For whom a member waits before it can train or stand by, for people; "" if for no node.

    ``last_end``: how the job's last run ended before this node came, if it may be of that run.
    """
    holders = [member.node for member in _rank_holders(view, ended=ended)]
    if me in holders:
        missing = _placed(view) - view.by_node.keys()
        if not missing or len(holders) >= nodes_min:
            return ""
        return f"a node in the place of {_named(missing)}: {len(holders)} of {nodes_min} are here"
    if any(node in proved for node in holders):
        return ""  # it stands by
    if holders:
        return f"a connection to a node that trains: {_named(holders)}"
    known = {me, *(node for node in view.by_node if node in proved)}
    strangers = view.by_node.keys() - known
    more = f"; not connected: {_named(strangers)}" if strangers else ""
    if len(known) >= nodes_min:
        return f"an epoch of {len(known)} nodes{more}"
    if last_end:
        more = (
            f"{more}; the last run of this job ended before this node came ({last_end}): stop this "
            "node if it belongs to that run. Under `ckpt run` or torchrun it would know"
        )
    return f"more nodes: {len(known)} of {nodes_min} are here{more}"


def _named(nodes: Collection[str]) -> str:
    first = sorted(nodes)[:NAMED_MAX]
    rest = len(nodes) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def misfits(view: View, *, ended: bool = False) -> dict[str, str]:
    """The members that do not fit the reference member, and why. O(members)."""
    reference = reference_member(view, ended=ended)
    if reference is None:
        return {}
    found = {member.node: misfit(reference, member) for member in view.members}
    return {node: reason for node, reason in found.items() if reason}


def without_members(view: View, nodes: Mapping[str, object]) -> View:
    """The view without these members, for the decision who gets ranks. Those that hold ranks in its
    epoch stay: only losing their lease ends that."""
    if not nodes:
        return view
    placed = {place.node for place in view.epoch.places} if view.epoch is not None else set()
    return replace(
        view,
        members=tuple(
            member for member in view.members if member.node not in nodes or member.node in placed
        ),
    )


# ---- one node's look at all members

PROOF_S = 5.0
"""How long a member may take to be connected before others are placed without it: a handshake's
limit. It takes milliseconds; a member that does not manage it may not know the secret."""
TELL_S = 1.0
"""How long a node that is refused stays a member, so that the other side sees it too."""


@dataclass(frozen=True, slots=True)
class AdmissionVerdict:
    """What one view says about who takes part.

    ``excluded``: members that get no ranks, and why. ``pending``: others without a place that are
    not proved yet and may be in a moment; ``pending_until_s``: until when they are waited for.
    ``may_lead``: whether this node may lead. ``refusal``: why this launch must end; "": it need
    not. ``look_s``: when the same view may say something else.
    """

    excluded: Mapping[str, str]
    pending: frozenset[str] = frozenset()
    pending_until_s: float = math.inf
    may_lead: bool = True
    refusal: str = ""
    look_s: float = math.inf

    def wait_until_s(self, decided_s: float) -> float:
        """Until when an epoch that was first decided at ``decided_s`` waits for ``pending`` at the
        latest; -inf: it does not.

        All of them together have one limit: members that come and go without end can't delay it
        further.
        """
        return decided_s + PROOF_S if self.pending else -math.inf


class Admission:
    """What one node learned about the others since it joined. ``silent_s``: how long a member's
    key may outlive it. Times are of any one clock."""

    def __init__(self, *, silent_s: float) -> None:
        self._silent_s = silent_s
        self._seen_s: dict[str, float] = {}
        """When each member that is there was first seen."""
        self._conflicts: dict[str, tuple[float, str]] = {}
        """Since when, and why, a member does not fit, or the reference does not fit this node."""

    def look(
        self,
        view: View,
        me: str,
        *,
        proved: AbstractSet[str],
        suspects: Collection[str],
        ended: bool,
        now_s: float,
    ) -> AdmissionVerdict:
        """Judge a view. ``proved``: the nodes to which a connection was up since this node joined.
        ``ended``: its epoch is the end of a job. O(members)."""
        self._seen_s = {
            member.node: self._seen_s.get(member.node, now_s) for member in view.members
        }
        placed = _placed(view) if not ended else frozenset()
        unfit = misfits(view, ended=ended)
        refusal, refuse_s = self._refusal(view, me, unfit, proved, ended=ended, now_s=now_s)
        strangers = {
            node: until_s
            for node, since_s in self._seen_s.items()
            if node != me and node not in proved and node not in placed and node not in unfit
            for until_s in (since_s + PROOF_S,)
        }
        pending = {node: until_s for node, until_s in strangers.items() if until_s > now_s}
        excluded = unfit | dict.fromkeys(
            strangers, "no connection has proved that it knows the job's secret"
        )
        others = [node for node in view.by_node if node != me and node not in suspects]
        may_lead = me not in unfit and (
            not others
            or me in placed
            or any(node in proved for node in others)
            # A moment for connections of a node that has just joined, or of others that have.
            or (self._leads(view, me) and any(self._is_new(node, now_s) for node in others))
        )
        return AdmissionVerdict(
            excluded,
            frozenset(pending),
            min(pending.values(), default=math.inf),
            may_lead,
            refusal if refuse_s <= now_s else "",
            min([refuse_s, *pending.values()], default=math.inf),
        )

    def _leads(self, view: View, me: str) -> bool:
        return view.leader is not None and view.leader.node == me

    def _is_new(self, node: str, now_s: float) -> bool:
        return now_s < self._seen_s[node] + PROOF_S

    def _refusal(
        self,
        view: View,
        me: str,
        unfit: Mapping[str, str],
        proved: AbstractSet[str],
        *,
        ended: bool,
        now_s: float,
    ) -> tuple[str, float]:
        """Why this node's launch must end, and when.

        While ranks train, only those that do not fit end. Before that it is not known who is right,
        so all of them end: also if the other one was quicker and has left. A member that was never
        connected may be gone already; it counts once its key can't be that of an earlier launch.
        """
        reference = reference_member(view, ended=ended)
        against: Mapping[str, str] = unfit
        if reference is not None and me in unfit:
            against = {reference.node: unfit[me]}
        elif is_running(view, ended=ended):
            against, self._conflicts = {}, {}
        # Nodes of a job that ended leave because of that.
        left = {
            node: conflict
            for node, conflict in self._conflicts.items()
            if node in proved and node not in view.by_node and not ended
        }
        self._conflicts = left | {
            node: (self._conflicts.get(node, (now_s, ""))[0], why) for node, why in against.items()
        }
        if not self._conflicts:
            return "", math.inf
        due = {
            node: since_s + (TELL_S if node in proved else self._silent_s)
            for node, (since_s, _) in self._conflicts.items()
        }
        first = min(due, key=lambda node: (due[node], node))
        return self._conflicts[first][1], due[first]


def _placed(view: View) -> frozenset[str]:
    return frozenset(place.node for place in view.epoch.places) if view.epoch else frozenset()
