"""One node in its job's membership: joins, watches, leads when nobody else does, and tells what
each new epoch means here.

Two threads. One waits for changes; the other acts on what is known: the newest view, what other
nodes said over their lines, and what this node's keeper said. What follows is decided by pure
functions (``membership.decide``, ``Judge``) and done here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from ckpt.cluster.membership.api import Leading, LeaseStatus, Published
from ckpt.cluster.membership.decide import (
    MembershipOptions,
    WaitTimers,
    confirmed_suspects,
    decide,
    update_timers,
)
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.records import NodeInfo, StateInventory, View, encode_inventory
from ckpt.cluster.membership.transactions import INVENTORY_FACT
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.mesh.messages import MeetingAddress, MeshMessage, NodeEnded, NodeFailed
from ckpt.cluster.node.epochs import EpochTracker, NodeDeps, NodeMembership, NodeObserver
from ckpt.cluster.node.leading import (
    DecideFailures,
    EpochProblems,
    EpochReports,
    NodeReports,
    assess,
    encode_note,
    end_unseen,
    epoch_floor,
    epoch_note,
    mesh_topology,
    next_epoch,
)
from ckpt.errors import CkptError, FencedError, InternalError
from ckpt.events import Emit, Event

# What a node thinks of the others' lines, and what of it the membership has been told.
# Thread-safe.


class FailureDetector:
    """Of one membership of this node: a new one begins with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[str, str | None] = {}
        """What is to be told, by node; None: that it is taken back."""
        self._told: set[str] = set()

    def node_refused(self, node: str, why: str) -> None:
        """Its machine answers, and nobody listens there any more."""
        with self._lock:
            if node not in self._told or node in self._due:
                self._due[node] = why

    def node_reached(self, node: str) -> None:
        """A line to it is up."""
        with self._lock:
            if node in self._told or node in self._due:
                self._due[node] = None

    def report(self, view: View, suspect: Callable[[str, str | None], object]) -> None:
        """Tell what is due about those who are still members. What can't be told now is told the
        next time."""
        with self._lock:
            due, self._due = self._due, {}
            due = {node: why for node, why in due.items() if node in view.by_node}
            # Noted first: who is reached meanwhile must find that there is something to take back.
            self._told = {node for node in self._told if node in view.by_node} | due.keys()
        try:
            while due:
                node, why = next(iter(due.items()))
                suspect(node, why)
                del due[node]
                with self._lock:
                    if why is None and node not in self._due:
                        self._told.discard(node)
        finally:
            with self._lock:
                self._due = due | self._due


LOOK_S = 1.0
"""How often time alone may have changed what follows."""
VIEW_S = 5.0
"""How often the membership is read where nothing is said to have changed: each of N nodes reads of
all N."""
RETRY_S = 0.2
CLOSE_WAIT_S = 60.0
"""How long leaving waits for a call to the membership that is on its way."""


class Node:
    """See the module.

    ``grow_wait_s``: so long an epoch lasts before one follows only because there are more nodes:
    each costs a warm restart, and nodes that come one after the other shall come together.
    """

    def __init__(
        self,
        member: NodeMembership,
        info: Callable[[], NodeInfo],
        options: MembershipOptions,
        *,
        decide_failures: DecideFailures,
        observer: NodeObserver,
        emit: Emit,
        deps: NodeDeps,
        grow_wait_s: float,
    ) -> None:
        self._member = member
        self._info = info
        self._options = options
        self._judge = decide_failures
        self._told = observer
        self._tell = emit
        self._make_lines, self._agent = deps.open_mesh, deps.agent
        self._epochs = EpochTracker(observer, pick_meeting=deps.pick_meeting, send=self.send)
        self._grow_wait_s = grow_wait_s
        self._changed = threading.Condition()
        self._stopped = self._over = self._rejoin = self._dirty = False
        self._lines: Mesh | None = None
        self._me: NodeInfo | None = None
        self._joining: NodeInfo | None = None  # a member, which has not seen itself as one yet
        self._began_at = self._joined_at = 0
        """Revisions at which this node joined, the first time and last."""
        self._view: View | None = None
        self._reports = NodeReports()
        self._mine: NodeFailed | NodeEnded | None = None
        self._holdings: bytes | None = None
        self._suspects = FailureDetector()
        # For the thread that acts alone:
        self._since = (0, 0.0)
        self._noticed = WaitTimers()
        self._said_holdings: tuple[str, bytes] | None = None
        self._lost: dict[str, float] = {}
        self._said = ""
        self._threads = [
            threading.Thread(target=self._watch, name="ckpt-node-watch", daemon=True),
            threading.Thread(target=self._act, name="ckpt-node", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # ---- from the keeper; thread-safe, and quick

    @property
    def node_id(self) -> str:
        """This node's id; "" before it joined."""
        return self._me.node if self._me is not None else ""

    @property
    def lease_status(self) -> LeaseStatus:
        """What this node may do now."""
        return self._member.lease_status()

    @property
    def refused(self) -> int:
        """How many connections were refused since it last joined: they proved nothing."""
        lines = self._lines
        return 0 if lines is None else lines.refused

    def send(self, node: str, word: MeshMessage) -> bool:
        """Say something to another node's keeper; False where there is no line to it now."""
        lines = self._lines
        return lines is not None and lines.send(node, word)

    def is_connected(self, node: str) -> bool:
        """Whether there is a line to that node now."""
        lines = self._lines
        return lines is not None and node in lines.connected_nodes()

    def report_failure(self, failure: NodeFailed) -> None:
        """The trainers of this node are dead, because of this; the next epoch may begin."""
        self._say_mine(failure)

    def report_ended(self, attempt: int) -> None:
        """All ranks of this node ended well."""
        self._say_mine(NodeEnded(attempt=attempt))

    def put_inventory(self, holdings: StateInventory) -> None:
        """What this node has of a world's ranks: who leads gives it, rather than another standby,
        the place of one of them."""
        data = encode_inventory(holdings)
        with self._changed:
            if data != self._holdings:
                self._holdings = data
                self._touch()

    def close(self, *, keep: bool = False) -> None:
        """Leave the membership and hang up. ``keep``: another keeper of this node takes it on."""
        with self._changed:
            self._stopped = True
            self._touch()
        for thread in self._threads:
            thread.join(CLOSE_WAIT_S)
        self._leave(keep=keep)
        if self._lines is not None:
            self._lines.close()

    def _say_mine(self, word: NodeFailed | NodeEnded) -> None:
        with self._changed:
            self._mine = word
            self._touch()
        self._pass_on_mine()

    def _leave(self, *, keep: bool = False) -> None:
        try:
            self._member.leave(keep=keep)
        except CkptError as error:
            self._tell(Event("leave-failed", f"the membership ends by itself: {error}"))

    # ---- the thread that waits

    def _watch(self) -> None:
        while not self._done:
            me = self._me
            try:
                lost = self._member.lease_status().state is LeaseState.LOST
                if me is not None and self._rejoin and self._joining is None and not lost:
                    self._pause(RETRY_S)  # its lease has yet to learn it
                    continue
                if me is None or self._rejoin:
                    me = self._join()
                view = self._member.view()
                if me.node not in view.by_node:
                    raise FencedError(f"this node is no member any more. node={me.node}")
                self._said = ""
                self._see(view, me)
                self._wait_change(view)
            except FencedError as error:
                self._lose(str(error), me)
            except CkptError as error:
                self._say_once(
                    "membership-waits", f"the membership can't be reached, tried again: {error}"
                )
                self._pause(RETRY_S)
            except Exception as error:  # noqa: BLE001  a thread's border
                self._say_once(
                    "membership-failed",
                    f"{InternalError(f'the membership failed. cause={error!r}')}",
                )
                self._pause(LOOK_S)

    def _wait_change(self, view: View) -> None:
        """Until the membership is to be read again."""
        until_s = time.monotonic() + VIEW_S
        while not (
            self._done or self._rejoin or self._member.wait_change(view.revision, timeout_s=LOOK_S)
        ):
            if time.monotonic() >= until_s:
                return

    def _join(self) -> NodeInfo:
        info = self._joining
        if info is None or self._member.lease_status().state is LeaseState.LOST:
            self._joining = info = self._come()
        view = (
            self._member.view()
        )  # where this fails it is asked again: by now this node is a member
        joined_at = (
            view.by_node[info.node].joined_revision if info.node in view.by_node else view.revision
        )
        with self._changed:
            self._me, self._joining, self._rejoin = info, None, False
            self._joined_at = joined_at
            # Revisions of a membership whose data were lost begin anew.
            self._began_at = min(self._began_at or joined_at, joined_at)
            self._epochs.reset()
        self._tell(Event("joined", f"this node is {info.node} of its job", {"node": info.node}))
        return info

    def _come(self) -> NodeInfo:
        """Become a member, with lines of its own."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        with self._changed:  # before anybody can reach this node: what is said once it has joined is for its new self
            self._view = None
            self._suspects = FailureDetector()
        self._epochs.forget_meeting()
        heard = MeshObserver(
            on_message=self._on_word, on_connected=self._on_up, on_disconnected=self._on_down
        )
        info = self._info()
        self._lines = self._make_lines(info.node, heard)
        info = replace(info, address=f"{info.address}:{self._lines.port}")
        self._member.join(info, agent=self._agent)
        return info

    def _lose(self, why: str, me: NodeInfo | None) -> None:
        """The membership of ``me`` is over, whoever notices it first."""
        with self._changed:
            news = me is not None and me is self._me and not self._rejoin and not self._done
            if news:
                self._rejoin, self._view = True, None
        if news:
            self._told.on_membership_lost(why)
        self._pause(RETRY_S)

    def _see(self, view: View, me: NodeInfo) -> None:
        """Take a view for what is known, unless a newer one is."""
        with self._changed:
            known = self._view
            if (
                me is self._me
                and not self._rejoin
                and (known is None or known.revision <= view.revision)
            ):
                self._view = view
                self._touch()

    @property
    def _done(self) -> bool:
        return self._stopped or self._over

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._done, seconds)

    def _touch(self) -> None:
        self._dirty = True
        self._changed.notify_all()

    # ---- the lines' thread

    def _on_word(self, node: str, word: MeshMessage) -> None:
        match word:
            case NodeFailed() | NodeEnded():
                with self._changed:
                    self._reports.add(node, word, time.monotonic())
                    self._touch()
            case MeetingAddress():
                self._epochs.receive_meeting(word)
                with self._changed:
                    self._touch()
            case _:
                self._told.on_message(node, word)

    def _on_up(self, node: str) -> None:
        with self._changed:
            me = self._me
            root = (
                self._view.epoch.rank0_node
                if self._view is not None and self._view.epoch is not None
                else ""
            )
            self._suspects.node_reached(node)
            self._touch()
        self._pass_on_mine()
        if me is not None and root == me.node:
            self._epochs.resend_meeting(node)
        self._told.on_connected(node)

    def _on_down(self, node: str, why: str) -> None:
        with self._changed:
            if why.startswith("refused"):
                self._suspects.node_refused(node, why)
            self._touch()
        self._told.on_disconnected(node, why)

    def _pass_on_mine(self) -> None:
        mine, lines = self._mine, self._lines
        if mine is None or lines is None:
            return
        for node in lines.connected_nodes():
            lines.send(node, mine)

    # ---- the thread that acts

    def _act(self) -> None:
        until_s = 0.0
        while not self._done:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._dirty or self._done, max(0.0, until_s - time.monotonic())
                )
                self._dirty = False
                view, me, lines = self._view, self._me, self._lines
            until_s = time.monotonic() + LOOK_S
            if view is None or me is None or lines is None or self._done:
                continue
            try:
                lines.set_targets(mesh_topology(view, me.node))
                until_s = min(until_s, self._on_view(view, me))
            except FencedError as error:
                self._lose(str(error), me)
            except CkptError as error:
                self._say_once(
                    "membership-waits", f"the membership can't be reached, tried again: {error}"
                )
                self._pause(RETRY_S)
                with self._changed:
                    self._touch()
            except Exception as error:  # noqa: BLE001  a thread's border
                self._say_once(
                    "membership-failed", f"{InternalError(f'leading failed. cause={error!r}')}"
                )
                self._pause(LOOK_S)

    def _on_view(self, view: View, me: NodeInfo) -> float:
        """Act on what is known; returns when to look again."""
        self._see_epoch(view, me)
        if self._over:
            self._leave()  # at once: whoever starts this job again shall not find it here
            return 0.0
        self._suspects.report(view, self._suspect)
        self._say_holdings(me)
        gone = confirmed_suspects(view, self._options.witnesses_min)
        leads = view.leader is not None and view.leader.node == me.node
        if me.node not in gone and (view.leader is None or view.leader.node in gone):
            if isinstance(self._member.lead(view), Leading):
                self._tell(Event("leads", "this node leads now"))
            else:
                self._pause(RETRY_S)
            self._look(me)
        elif leads and me.node not in gone:
            return self._lead(view, me)
        self._noticed = WaitTimers()
        return time.monotonic() + LOOK_S

    def _say_holdings(self, me: NodeInfo) -> None:
        """Under this node's lease, so under another node id it is said again."""
        data = self._holdings
        if data is not None and self._said_holdings != (me.node, data):
            self._member.put_fact(INVENTORY_FACT, data)
            self._said_holdings = (me.node, data)

    def _suspect(self, node: str, why: str | None) -> None:
        self._member.suspect(node, why)
        text = f"{node} is suspected: {why}" if why is not None else f"{node} is suspected no more"
        self._tell(Event("suspects", text, {"node": node}))

    def _see_epoch(self, view: View, me: NodeInfo) -> None:
        if self._epochs.observe(view, me, joined_at=self._joined_at, began_at=self._began_at):
            self._over = epoch_note(view).end is not None
            with self._changed:
                self._reports.forget(view)
            self._epochs.report()

    def _lead(self, view: View, me: NodeInfo) -> float:
        now_s = time.monotonic()
        if end_unseen(view):
            return now_s + LOOK_S
        number = view.epoch.number if view.epoch is not None else 0
        if self._since[0] != number:
            self._since = (number, now_s)
        may_grow = now_s >= self._since[1] + self._grow_wait_s
        options = replace(self._options, may_grow=may_grow, epoch_floor=epoch_floor(view))
        self._noticed = update_timers(self._noticed, view, options, now_s)
        decision = decide(view, self._noticed, options, now_s)
        trouble = self._trouble(view, me, now_s)
        verdict = assess(view, trouble, self._judge, now_s)
        found = next_epoch(view, decision, verdict, trouble)
        if found is None:
            return min(
                getattr(decision, "until_s", now_s + LOOK_S), verdict.until_s or now_s + LOOK_S
            )
        record = replace(found.record, note=encode_note(found.note))
        if isinstance(self._member.publish(record, view, remove=found.remove), Published):
            text = f"epoch {record.number}: {found.note.why}"
            self._tell(Event("epoch-published", text, {"epoch": record.number}))
        else:
            self._pause(RETRY_S)
        self._look(me)
        return time.monotonic() + RETRY_S

    def _trouble(self, view: View, me: NodeInfo, now_s: float) -> EpochProblems:
        """What is known to be wrong with the view's epoch."""
        record = view.epoch
        if record is None:
            return EpochProblems(EpochReports({}, {}, frozenset()), {})
        with self._changed:
            if self._mine is not None:
                self._reports.add(me.node, self._mine, now_s)
            reported = self._reports.for_epoch(record)
        out = confirmed_suspects(view, self._options.witnesses_min)
        dead = [node for node in record.ranks if node not in view.by_node or node in out]
        self._lost = {
            node: self._lost.get(node, now_s) for node in dead if node not in reported.ended
        }
        return EpochProblems(reported, self._lost)

    def _look(self, me: NodeInfo) -> None:
        """Read the membership again now, not when it is next said to have changed."""
        self._see(self._member.view(), me)

    def _say_once(self, kind: str, text: str) -> None:
        if text != self._said and not self._done:
            self._said = text
            self._tell(Event(kind, text, alarm=True))
