"""One node in its job's membership: joins, watches, leads if no other node does, reports epochs.

Two threads. One waits for changes of the membership. The other acts on what is known: the newest
view, what other nodes reported over the mesh, and what this node's keeper reported. Pure functions
decide (``membership.decide``, ``leading``); this module does what they say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from ckpt.cluster.membership.admission import (
    Admission,
    AdmissionVerdict,
    awaited_nodes,
    without_members,
)
from ckpt.cluster.membership.decide import (
    MembershipOptions,
    NewEpoch,
    WaitForNodes,
    WaitTimers,
    confirmed_suspects,
    decide,
    update_timers,
)
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.outcomes import Leading, LeaseStatus, Published
from ckpt.cluster.membership.records import NodeInfo, StateInventory, View, encode_inventory
from ckpt.cluster.membership.transactions import INVENTORY_FACT
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.mesh.messages import MeetingAddress, MeshMessage, NodeEnded, NodeFailed
from ckpt.cluster.node.epochs import EpochTracker, NodeDeps, NodeObserver
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
from ckpt.threads import start_thread

# ---- failure detector


class FailureDetector:
    """Turns refused and restored connections into suspicions to write or withdraw. Thread-safe.

    It belongs to one join of this node: after the next one no suspicion of it is left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[str, str | None] = {}
        """Suspicions to write, by node; None: to withdraw."""
        self._suspected: set[str] = set()
        """Nodes of which a suspicion may be in the membership."""

    def node_refused(self, node: str, why: str) -> None:
        """The node's machine answers, but no keeper listens there: the process is dead."""
        with self._lock:
            if node not in self._suspected or node in self._due:
                self._due[node] = why

    def node_reached(self, node: str) -> None:
        """A connection to the node is up."""
        with self._lock:
            if node in self._suspected or node in self._due:
                self._due[node] = None

    def report(self, view: View, suspect: Callable[[str, str | None], object]) -> None:
        """Write what is due about current members by ``suspect``. If that raises, the rest is
        written at the next call."""
        with self._lock:
            due, self._due = self._due, {}
            due = {node: why for node, why in due.items() if node in view.by_node}
            # Before the call: if the node is reached during it, there is a suspicion to withdraw.
            self._suspected = {
                node for node in self._suspected if node in view.by_node
            } | due.keys()
        try:
            while due:
                node, why = next(iter(due.items()))
                suspect(node, why)
                del due[node]
                with self._lock:
                    if why is None and node not in self._due:
                        self._suspected.discard(node)
        finally:
            with self._lock:
                self._due = due | self._due


LOOK_S = 1.0
"""How often decisions are made again, since time alone may change them."""
VIEW_S = 5.0
"""How often the membership is read if no change is reported. Each of N nodes reads N members."""
RETRY_S = 0.2
CLOSE_WAIT_S = 60.0
"""How long ``close`` waits for a call to the membership that is under way."""


class Node:
    """One node. ``info`` describes it, anew for each join; the two threads start at once.

    ``grow_wait_s``: how long an epoch lasts before another one follows only because more nodes have
    joined. Each costs a warm restart, so nodes that join one after the other should enter together.

    It has more attributes than our limit: what the keeper, the mesh and the two threads share is
    guarded by one condition, ``_changed``; the acting thread's own state stands last.
    """

    def __init__(
        self,
        member: KeyspaceMembership,
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
        self._decide_failures = decide_failures
        self._observer = observer
        self._emit = emit
        self._deps = deps
        self._epochs = EpochTracker(observer, pick_meeting=deps.pick_meeting, send=self.send)
        self._grow_wait_s = grow_wait_s
        self._changed = threading.Condition()
        self._stopped = self._over = self._rejoin = self._dirty = False
        self._mesh: Mesh | None = None
        self._me: NodeInfo | None = None
        self._joining: NodeInfo | None = None
        """Joined, but the view after it has not been read yet: read it again, don't join again."""
        self._began_at, self._joined_at = max(0, deps.ends_after + 1), 0
        """Revisions from which on this node is in the job, 0 until it joined if that is not known,
        and at which it joined last."""
        self._view: View | None = None
        self._reports = NodeReports()
        self._own_report: NodeFailed | NodeEnded | None = None
        self._inventory: bytes | None = None
        self._detector = FailureDetector()
        self._proved: frozenset[str] = frozenset()
        """Nodes to which a connection was up since this node last joined."""
        # Of the acting thread alone:
        self._admission = Admission(silent_s=2 * deps.ttl_s + 2.0)
        self.awaited = ""
        """For which nodes this one waits, for people; "" if for none."""
        self._admission_of = ""
        """The node id that it belongs to."""
        self._excluded: frozenset[str] = frozenset()
        """The members of which it was reported that they get no ranks."""
        self._dialled: dict[str, str] = {}
        """The nodes to be connected to, and their addresses."""
        self._epoch_since = (0, 0.0)
        self._timers = WaitTimers()
        self._decided_s: float | None = None
        """Since when this leader would publish the next epoch; None: it would not."""
        self._put_inventory: tuple[str, bytes] | None = None
        self._lost: dict[str, float] = {}
        self._reported_text = ""
        self._threads = [
            threading.Thread(target=self._watch, name="ckpt-node-watch", daemon=True),
            threading.Thread(target=self._act, name="ckpt-node", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # ---- called by the keeper: thread-safe, and quick

    @property
    def node_id(self) -> str:
        """This node's id; "" before it joined."""
        return self._me.node if self._me is not None else ""

    @property
    def lease_status(self) -> LeaseStatus:
        """What this node may do now. Makes no call."""
        return self._member.lease_status()

    @property
    def refused(self) -> int:
        """How many connections this node refused since it last joined."""
        mesh = self._mesh
        return 0 if mesh is None else mesh.refused

    def send(self, node: str, message: MeshMessage) -> bool:
        """Send a message to another node's keeper; False if no connection to it is up now."""
        mesh = self._mesh
        return mesh is not None and mesh.send(node, message)

    def is_connected(self, node: str) -> bool:
        """Whether a connection to that node is up now."""
        mesh = self._mesh
        return mesh is not None and node in mesh.connected_nodes()

    def report_failure(self, failure: NodeFailed) -> None:
        """Report to the leader that this node's trainers are dead; the next epoch may begin."""
        self._report(failure)

    def report_ended(self, attempt: int) -> None:
        """Report to the leader that all ranks of this node ended successfully."""
        self._report(NodeEnded(attempt=attempt))

    def put_inventory(self, inventory: StateInventory) -> None:
        """Write to the membership which ranks' state this node has in memory.

        The leader gives their place to this standby rather than to another one.
        """
        data = encode_inventory(inventory)
        with self._changed:
            if data != self._inventory:
                self._inventory = data
                self._touch()

    def depart(self) -> None:
        """Leave the membership in the background; connections stay until ``close``."""
        with self._changed:
            self._over = True
            self._touch()
        start_thread(self._leave, name="ckpt-node-depart")

    def close(self, *, keep: bool = False) -> None:
        """Leave the membership and close the mesh. ``keep``: another keeper of this node takes the
        membership on."""
        with self._changed:
            self._stopped = True
            self._touch()
        for thread in self._threads:
            thread.join(CLOSE_WAIT_S)
        self._leave(keep=keep)
        if self._mesh is not None:
            self._mesh.close()

    def _report(self, message: NodeFailed | NodeEnded) -> None:
        with self._changed:
            self._own_report = message
            self._touch()
        self._send_own_report()

    def _leave(self, *, keep: bool = False) -> None:
        try:
            self._member.leave(keep=keep)
        except CkptError as error:
            self._emit(
                Event("leave-failed", f"the lease could not be ended, and will expire: {error}")
            )

    # ---- the watching thread

    def _watch(self) -> None:
        while not self._done:
            me = self._me
            try:
                lost = self._member.lease_status().state is LeaseState.LOST
                if me is not None and self._rejoin and self._joining is None and not lost:
                    self._pause(RETRY_S)  # the keepalive has not noticed yet
                    continue
                if me is None or self._rejoin:
                    me = self._join()
                view = self._member.view()
                if me.node not in view.by_node:
                    raise FencedError(f"this node is no member any more. node={me.node}")
                self._reported_text = ""
                self._take_view(view, me)
                self._wait_change(view)
            except FencedError as error:
                self._on_lost(str(error), me)
            except CkptError as error:
                self._report_once(
                    "membership-waits", f"the membership can't be reached, tried again: {error}"
                )
                self._pause(RETRY_S)
            except Exception as error:  # noqa: BLE001  the border of a thread
                self._report_once(
                    "membership-failed",
                    f"{InternalError(f'the membership failed. cause={error!r}')}",
                )
                self._pause(LOOK_S)

    def _wait_change(self, view: View) -> None:
        """Wait until the membership should be read again."""
        until_s = time.monotonic() + VIEW_S
        while not (
            self._done or self._rejoin or self._member.wait_change(view.revision, timeout_s=LOOK_S)
        ):
            if time.monotonic() >= until_s:
                return

    def _join(self) -> NodeInfo:
        info = self._joining
        if info is None or self._member.lease_status().state is LeaseState.LOST:
            self._joining = info = self._join_anew()
        view = self._member.view()  # if this raises, ``_joining`` leads here again
        joined_at = (
            view.by_node[info.node].joined_revision if info.node in view.by_node else view.revision
        )
        with self._changed:
            self._me, self._joining, self._rejoin = info, None, False
            self._joined_at = joined_at
            # If the keyspace lost its data, revisions begin anew: then the last join counts.
            self._began_at = min(self._began_at or joined_at, joined_at)
            self._epochs.reset()
        self._emit(Event("joined", f"this node is {info.node} of its job", {"node": info.node}))
        return info

    def _join_anew(self) -> NodeInfo:
        """Become a member under a new id, with a new mesh."""
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None
        # Before the new mesh is open: what arrives there is meant for the new id.
        with self._changed:
            self._view = None
            self._detector = FailureDetector()
            self._proved = frozenset()
        self._epochs.forget_meeting()
        observer = MeshObserver(
            on_message=self._on_message,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
        )
        info = self._info()
        self._mesh = self._deps.open_mesh(info.node, observer)
        info = replace(info, address=f"{info.address}:{self._mesh.port}")
        self._member.join(info, agent=self._deps.agent)
        return info

    def _on_lost(self, reason: str, me: NodeInfo | None) -> None:
        """Report once, whichever thread notices it, that the membership of ``me`` is over."""
        with self._changed:
            first = me is not None and me is self._me and not self._rejoin and not self._done
            if first:
                self._rejoin, self._view = True, None
        if first:
            self._observer.on_membership_lost(reason)
        self._pause(RETRY_S)

    def _take_view(self, view: View, me: NodeInfo) -> None:
        """Keep ``view`` as the newest one, unless a newer one is there or this node joined anew."""
        with self._changed:
            newest = self._view
            if (
                me is self._me
                and not self._rejoin
                and (newest is None or newest.revision <= view.revision)
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

    # ---- called in the mesh's thread

    def _on_message(self, node: str, message: MeshMessage) -> None:
        match message:
            case NodeFailed() | NodeEnded():
                with self._changed:
                    self._reports.add(node, message, time.monotonic())
                    self._touch()
            case MeetingAddress():
                self._epochs.receive_meeting(message)
                with self._changed:
                    self._touch()
            case _:
                self._observer.on_message(node, message)

    def _on_connected(self, node: str) -> None:
        with self._changed:
            me = self._me
            root = (
                self._view.epoch.rank0_node
                if self._view is not None and self._view.epoch is not None
                else ""
            )
            self._detector.node_reached(node)
            self._proved |= {node}
            self._touch()
        # What was sent over the last connection may be lost.
        self._send_own_report()
        if me is not None and root == me.node:
            self._epochs.resend_meeting(node)
        self._observer.on_connected(node)

    def _on_disconnected(self, node: str, reason: str) -> None:
        with self._changed:
            # Only a refusal is evidence. Silence may be the network's, and the lease will tell.
            if reason.startswith("refused"):
                self._detector.node_refused(node, reason)
            self._touch()
        self._observer.on_disconnected(node, reason)

    def _send_own_report(self) -> None:
        report, mesh = self._own_report, self._mesh
        if report is None or mesh is None:
            return
        for node in mesh.connected_nodes():
            mesh.send(node, report)

    # ---- the acting thread

    def _act(self) -> None:
        until_s = 0.0
        while not self._done:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._dirty or self._done, max(0.0, until_s - time.monotonic())
                )
                self._dirty = False
                view, me, mesh = self._view, self._me, self._mesh
            until_s = time.monotonic() + LOOK_S
            if view is None or me is None or mesh is None or self._done:
                continue
            try:
                mesh.set_targets(self._targets(mesh, view, me))
                until_s = min(until_s, self._on_view(view, me))
            except FencedError as error:
                self._on_lost(str(error), me)
            except CkptError as error:
                self._report_once(
                    "membership-waits", f"the membership can't be reached, tried again: {error}"
                )
                self._pause(RETRY_S)
                with self._changed:
                    self._touch()
            except Exception as error:  # noqa: BLE001  the border of a thread
                self._report_once(
                    "membership-failed", f"{InternalError(f'leading failed. cause={error!r}')}"
                )
                self._pause(LOOK_S)

    def _targets(self, mesh: Mesh, view: View, me: NodeInfo) -> dict[str, str]:
        """Whom to be connected to. A node of the epoch that has left stays connected until its own
        end: it may still have something in flight to the store, for which it needs this one."""
        wanted = mesh_topology(view, me.node)
        placed = view.epoch.ranks if view.epoch is not None else {}
        connected = mesh.connected_nodes()
        left = {
            node: address
            for node, address in self._dialled.items()
            if node in placed and node in connected
        }
        self._dialled = left | wanted
        return self._dialled

    def _on_view(self, view: View, me: NodeInfo) -> float:
        """Act on the newest view; returns when to act again."""
        self._observe_epoch(view, me)
        if self._over:
            self._leave()  # at once: the next launch of this job must not find this node
            return 0.0
        self._detector.report(view, self._suspect)
        self._write_inventory(me)
        suspects = confirmed_suspects(view, self._options.witnesses_min)
        admission = self._judge_members(view, me, suspects)
        leads = view.leader is not None and view.leader.node == me.node
        if leads and not admission.may_lead:
            self._member.stop_leading()
            self._read_view(me)
            return time.monotonic() + RETRY_S
        # A node that enough witnesses suspect does not lead, nor decide: it may be cut off itself.
        vacant = view.leader is None or view.leader.node in suspects
        if admission.may_lead and me.node not in suspects and vacant:
            if isinstance(self._member.lead(view), Leading):
                self._emit(Event("leads", "this node leads now"))
            else:
                self._pause(RETRY_S)
            self._read_view(me)
        elif leads and me.node not in suspects:
            return min(self._lead(view, me, admission), admission.look_s)
        # Waits are counted only while this node leads without a break.
        self._timers, self._decided_s = WaitTimers(), None
        return min(time.monotonic() + LOOK_S, admission.look_s)

    def _judge_members(
        self, view: View, me: NodeInfo, suspects: Collection[str]
    ) -> AdmissionVerdict:
        """Who may take part; ends this launch if it can't."""
        if self._admission_of != me.node:
            self._admission_of = me.node
            self._admission = Admission(silent_s=2 * self._deps.ttl_s + 2.0)
        note = epoch_note(view)
        ended = note.end is not None
        verdict = self._admission.look(
            view,
            me.node,
            proved=self._proved,
            suspects=suspects,
            ended=ended,
            now_s=time.monotonic(),
        )
        for node, reason in verdict.excluded.items():
            if node not in self._excluded and node not in verdict.pending:
                text = f"{node} gets no ranks of this job: {reason}"
                self._emit(Event("node-refused", text, {"node": node}, alarm=True))
        self._excluded = frozenset(verdict.excluded) - verdict.pending
        if verdict.refusal:
            self._observer.on_refused(verdict.refusal)
        # Without an agent it is unknown when this run began: the end may be that of an earlier one.
        unclear = ended and self._deps.ends_after < 0 and view.epoch_revision < self._began_at
        self.awaited = awaited_nodes(
            view,
            me.node,
            proved=self._proved,
            nodes_min=self._options.nodes_min,
            ended=ended,
            last_end=note.why if unclear else "",
        )
        return verdict

    def _write_inventory(self, me: NodeInfo) -> None:
        """Write the inventory if it, or the node id, changed: it is deleted with the lease."""
        data = self._inventory
        if data is not None and self._put_inventory != (me.node, data):
            self._member.put_fact(INVENTORY_FACT, data)
            self._put_inventory = (me.node, data)

    def _suspect(self, node: str, reason: str | None) -> None:
        self._member.suspect(node, reason)
        state = f"suspected: {reason}" if reason is not None else "suspected no more"
        text = f"{node} is {state}"
        self._emit(Event("suspects", text, {"node": node}))

    def _observe_epoch(self, view: View, me: NodeInfo) -> None:
        if self._epochs.observe(view, me, joined_at=self._joined_at, began_at=self._began_at):
            self._over = epoch_note(view).end is not None
            with self._changed:
                self._reports.forget(view)
            self._epochs.report()

    def _lead(self, view: View, me: NodeInfo, admission: AdmissionVerdict) -> float:
        now_s = time.monotonic()
        if end_unseen(view):
            return now_s + LOOK_S
        number = view.epoch.number if view.epoch is not None else 0
        if self._epoch_since[0] != number:
            self._epoch_since, self._decided_s = (number, now_s), None
        may_grow = now_s >= self._epoch_since[1] + self._grow_wait_s
        options = replace(self._options, may_grow=may_grow, epoch_floor=epoch_floor(view))
        # Decided for those that may have ranks; all else is about all members.
        fit = without_members(view, admission.excluded)
        self._timers = update_timers(self._timers, fit, options, now_s)
        decision = decide(fit, self._timers, options, now_s)
        if isinstance(decision, NewEpoch):
            self._decided_s = now_s if self._decided_s is None else self._decided_s
            until_s = admission.wait_until_s(self._decided_s)
            if now_s < until_s:
                # Or earlier: as soon as they are connected, or when ``admission.look_s`` comes.
                decision = WaitForNodes(until_s, "members are being connected")
        else:
            self._decided_s = None
        problems = self._problems(view, me, now_s)
        failure_decision = assess(view, problems, self._decide_failures, now_s)
        next_ = next_epoch(view, decision, failure_decision, problems)
        if next_ is None:
            until_s = decision.until_s if isinstance(decision, WaitForNodes) else now_s + LOOK_S
            return min(until_s, failure_decision.until_s or now_s + LOOK_S)
        # Losing the race is ordinary: the view is read again, and decided anew.
        record = replace(next_.record, note=encode_note(next_.note))
        if isinstance(self._member.publish(record, view, remove=next_.remove), Published):
            text = f"epoch {record.number}: {next_.note.why}"
            self._emit(Event("epoch-published", text, {"epoch": record.number}))
        else:
            self._pause(RETRY_S)
        self._read_view(me)
        return time.monotonic() + RETRY_S

    def _problems(self, view: View, me: NodeInfo, now_s: float) -> EpochProblems:
        """What is known to be wrong with the view's epoch."""
        record = view.epoch
        if record is None:
            return EpochProblems(EpochReports({}, {}, frozenset()), {})
        with self._changed:
            # The leader's own report does not travel over the mesh.
            if self._own_report is not None:
                self._reports.add(me.node, self._own_report, now_s)
            reported = self._reports.for_epoch(record)
        suspects = confirmed_suspects(view, self._options.witnesses_min)
        dead = [node for node in record.ranks if node not in view.by_node or node in suspects]
        # A node that ended is expected to leave. The time of a loss is kept from view to view.
        self._lost = {
            node: self._lost.get(node, now_s) for node in dead if node not in reported.ended
        }
        return EpochProblems(reported, self._lost)

    def _read_view(self, me: NodeInfo) -> None:
        """Read the membership now, without waiting for a change to be reported."""
        self._take_view(self._member.view(), me)

    def _report_once(self, kind: str, text: str) -> None:
        if text != self._reported_text and not self._done:
            self._reported_text = text
            self._emit(Event(kind, text, alarm=True))
