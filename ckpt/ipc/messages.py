"""The messages between a keeper and the supervisors, trainers and tools of its node.

Each message is one msgpack map with a ``type`` tag, sent as one frame (see ``frames``). A message
with an ``id`` above 0 is a call: the keeper answers it with exactly one ``Reply`` of the same id,
possibly much later, and replies on one connection may overtake each other. All other messages are
one-way. File descriptors travel beside a frame.

The tags and field names are the wire format: class names may change, those may not without a new
``WIRE_VERSION``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ckpt import errors
from ckpt.errors import CkptError, InternalError
from ckpt.events import Fact
from ckpt.format.canonical import prepare_decoders
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo


class RemoteError(msgspec.Struct, frozen=True):
    """An error as a message.

    ``code`` names its class, ``rank`` the rank on which it happened (-1: none).
    """

    code: str
    text: str
    rank: int


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of all messages. An ``id`` above 0 makes it a call."""

    id: int = 0


# ---- reports: what a keeper shows to tools


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One slot: the snapshot that is sealed in it (None: none), and whether an upload holds it."""

    index: int
    size_bytes: int
    snapshot: SnapshotId | None
    held: bool


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rank as its keeper sees it. ``idle_s``: seconds since its last boundary."""

    rank: int
    supervisor_pid: int
    trainer_pid: int
    completed: int
    phase: str
    idle_s: float
    staged: int
    skipped: int
    slots: tuple[SlotReport, ...]


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the job's newest epoch. ``here``: it is the reporting keeper's own node.

    ``first_rank`` -1 with ``ranks`` 0 is a standby. ``mirrored`` is the newest snapshot of which
    every node has a copy on another node; on a standby, the newest snapshot of which it stores
    all its copies (None: none, or unknown to this keeper).
    """

    node: str
    here: bool
    first_rank: int
    ranks: int
    mirrored: SnapshotId | None


class StoreBehind(msgspec.Struct, frozen=True, kw_only=True):
    """A store that lacks what others of the job's stores have: how many objects, as far as its
    keeper knows.

    ``more``: it lacks more than the keeper remembers; a scrub finds the rest.
    """

    store: str
    objects: int
    more: bool = False


class KeeperReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one keeper.

    ``recoveries``: the last ones, oldest first, as facts. ``rss_bytes``: the keeper's own memory
    without slots.
    """

    job: str
    store: str
    pid: int
    boot: str
    launch: str
    attempt: int
    epoch: int
    state: str
    since_s: float
    complete: SnapshotId | None
    durable: SnapshotInfo | None
    uploads: int
    slot_bytes: int
    rss_bytes: int
    ranks: tuple[RankReport, ...]
    recoveries: tuple[Mapping[str, Fact], ...]
    nodes: tuple[NodeReport, ...] = ()
    mirror_bytes: int = 0
    """With several nodes: how many bytes other nodes have stored for this one so far."""
    refused: Mapping[str, int] = {}
    """With several nodes: how many requests were rejected, by kind.

    ``line`` counts connections between keepers, the others count requests for peer memory.
    """
    behind: tuple[StoreBehind, ...] = ()
    """With several stores: those that are known to lack something."""


# ---- placement: where ranks and their staged state are


class RankPlacement(msgspec.Struct, frozen=True):
    """Where this node's ranks are in a job of several nodes.

    They are consecutive from ``first_rank``. Rank 0 is at ``host``. ``node`` counts from 0.
    """

    host: str
    first_rank: int
    world_size: int
    node: int
    nodes: int


class Source(msgspec.Struct, frozen=True):
    """Where one rank's share of a staged snapshot is stored.

    ``local`` is the local rank whose slot has it, -1 for none. ``slots`` and ``mirrors`` are
    addresses of nodes that serve it, from a slot or from a mirror.
    """

    local: int = -1
    slots: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()


prepare_decoders(RankPlacement, Source)


# ---- replies


class Reply(Message, frozen=True, kw_only=True, tag="Reply"):
    """Base of replies. If ``error`` is set, the call failed and the other fields mean nothing."""

    error: RemoteError | None = None


class Done(Reply, frozen=True, kw_only=True, tag="Done"):
    """The call was carried out, or failed."""


class Welcome(Reply, frozen=True, kw_only=True, tag="Welcome"):
    """The reply to ``Hello``. ``boot`` is random for each keeper process.

    ``new``: the keeper knows nothing of the peer's attempt, so the supervisor sends the
    descriptors that it kept. ``seating`` is set if the job has several nodes.
    """

    boot: str
    pid: int
    attempt: int
    new: bool = False
    seating: RankPlacement | None = None


class OtherSettings(Reply, frozen=True, kw_only=True, tag="OtherSettings"):
    """The reply to the ``Hello`` of a new launch that differs from the keeper's own settings.

    The peer sends ``Settings`` next, and looks for the keeper that follows.
    """


class Value(Reply, frozen=True, kw_only=True, tag="Value"):
    """The value of a key, or None."""

    value: bytes | None


class Number(Reply, frozen=True, kw_only=True, tag="Number"):
    """A count, or the number of an epoch.

    ``origin`` goes with an epoch and is stored in its staged indexes: two keepers may give out
    the same number.
    """

    number: int
    origin: str = ""


class SlotEntry(msgspec.Struct, frozen=True):
    """One slot that the keeper owns."""

    index: int
    size_bytes: int


class Slots(Reply, frozen=True, kw_only=True, tag="Slots"):
    """The slots of one rank, with their memfds beside them in the same order."""

    slots: tuple[SlotEntry, ...]


class Sources(Reply, frozen=True, kw_only=True, tag="Sources"):
    """Where each rank's share of a snapshot is, by rank; empty if the snapshot is unknown."""

    ranks: tuple[Source, ...]
    epoch: int = 0


class Choice(msgspec.Struct, frozen=True):
    """A snapshot to restore. ``tier`` is ``staged`` (slots of all ranks have it) or ``durable``."""

    snapshot: SnapshotId
    tier: str


class Choices(Reply, frozen=True, kw_only=True, tag="Choices"):
    """What can be restored, best first: snapshots on the lineage of the newest epoch."""

    choices: tuple[Choice, ...]


class Status(Reply, frozen=True, kw_only=True, tag="Status"):
    """The answer to ``ckpt ps`` and ``ckpt top``."""

    report: KeeperReport | None


# ---- the user's choices


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the user chose about failures; equal on all ranks.

    ``same_error_max``: that many equal exceptions in a row at the same step are a bug and end the
    job. ``stuck_max``: that many failures in a row without one completed step end the job.
    ``hang_s``: the least time without a step that counts as a hang (0: never). ``start_s``: as
    that, for the first step of an attempt; ``build_s``: for each stretch of what precedes it.
    ``grace_s``: how long a preempted job may take until it
    has ended. ``linger_s``: how long slots are kept for a program that was killed.
    """

    same_error_max: int = 2
    stuck_max: int = 5
    hang_s: float = 600.0
    start_s: float = 1800.0
    build_s: float = 7200.0
    grace_s: float = 25.0
    linger_s: float = 60.0


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """Which snapshots to keep: the policy's text, and how long the bytes of dropped ones stay.

    ``adapts``: the user left the latter to the keeper.
    """

    keep: str
    grace_s: float
    adapts: bool = False


WIRE_VERSION = 4
"""Increased with each change of a message. Peers of different versions reject each other."""


# ---- from all peers


class Hello(Message, frozen=True, kw_only=True, tag="Hello"):
    """The first message on every connection; a call.

    The reply is ``Welcome``, or an error that says why the peer is rejected.

    ``role`` is ``supervisor``, ``trainer`` (for its calls), ``events`` (a trainer's second
    connection, for messages from the keeper) or ``tool``. ``launch`` names one start of the whole
    program: all its ranks share it and no other start has it. ``attempt`` is the one that the
    peer belongs to, 0 for none. ``ranks`` is the number of ranks on this node, ``rank`` the
    peer's.

    ``holds``: a supervisor kept slots or a board of an earlier keeper, and sends them before
    ``Killed``. ``agent`` is the name of torchrun's agent on this node (``NodesSpec.agent``). The
    supervisor sends it because a keeper may outlive the launch that started it; ``ends_after``
    (``NodesSpec.ends_after``) likewise.

    ``stores`` and ``access`` are digests of the peer's settings (``KeeperSpec.stores_digest`` and
    ``access_digest``); "" if it sends none. A keeper of other settings serves no new launch.

    ``capture_rule``: what decides when all ranks capture, as ``name=value`` words; from a
    supervisor. All nodes must say the same.
    """

    version: int
    role: str
    pid: int
    launch: str = ""
    rank: int = 0
    ranks: int = 0
    attempt: int = 0
    holds: bool = False
    policy: Policy | None = None
    agent: str = ""
    stores: str = ""
    access: str = ""
    ends_after: int = -1
    capture_rule: str = ""


class Settings(Message, frozen=True, kw_only=True, tag="Settings"):
    """A call, only after ``OtherSettings``. The keeper starts its successor with these settings.

    ``spec`` is an encoded ``KeeperSpec``, ``environment`` the peer's variables, ``program`` what
    runs a keeper there. The reply is the end of the connection, after which the peer says hello
    again, or the error that left the keeper as it was.
    """

    spec: bytes
    environment: Mapping[bytes, bytes]
    program: tuple[str, ...]


class Bye(Message, frozen=True, kw_only=True, tag="Bye"):
    """The peer leaves as planned. A connection that ends without ``Bye`` was cut off."""


# ---- from supervisors


class Started(Message, frozen=True, kw_only=True, tag="Started"):
    """A trainer of ``attempt`` was started by ``fork``, ``spawn`` or as ``prepared``.

    Times are CLOCK_MONOTONIC seconds.
    """

    attempt: int
    trainer_pid: int
    how: str
    at_s: float


class Failing(Message, frozen=True, kw_only=True, tag="Failing"):
    """User code raised an exception, and this trainer is about to exit because of it.

    Equal exceptions at equal places have equal ``fingerprint``s. ``final``: a restart would not
    help (a usage error, Ctrl-C). ``passing``: an outage that may pass by itself.
    """

    kind: str
    text: str
    fingerprint: str
    step: int
    final: bool = False
    passing: bool = False


class Died(Message, frozen=True, kw_only=True, tag="Died"):
    """The trainer ended by itself.

    ``status`` is as from ``os.waitstatus_to_exitcode``: an exit code, or minus a signal.
    ``overdue``: the supervisor stopped it because this node's lease had run out; the program did
    nothing wrong. ``failing``: the exception that it told its supervisor of, in case no keeper took
    its own message.
    """

    attempt: int
    status: int
    at_s: float
    overdue: bool = False
    failing: Failing | None = None


class Killed(Message, frozen=True, kw_only=True, tag="Killed"):
    """The answer to ``Kill``: no process of the attempt is left on this rank."""

    attempt: int


class Preempt(Message, frozen=True, kw_only=True, tag="Preempt"):
    """This node is about to be taken away: stop at a boundary, durable, within ``grace_s``.

    Sent by supervisors and trainers.
    """

    grace_s: float


class SlotKept(Message, frozen=True, kw_only=True, tag="SlotKept"):
    """To a new keeper: a slot that this supervisor kept. Its memfd travels beside the message."""

    rank: int
    index: int
    size_bytes: int


class BoardKept(Message, frozen=True, kw_only=True, tag="BoardKept"):
    """To a new keeper: the board that this supervisor kept.

    Its memfd travels beside the message.
    """


# ---- from trainers


class Post(Message, frozen=True, kw_only=True, tag="Post"):
    """Publish ``value`` under ``key`` in the attempt's mailbox."""

    key: str
    value: bytes


class Peek(Message, frozen=True, kw_only=True, tag="Peek"):
    """A call. ``Value`` of the key as soon as it is posted, or None after ``wait_s`` seconds."""

    key: str
    wait_s: float = 0.0


class Count(Message, frozen=True, kw_only=True, tag="Count"):
    """A call. Add to a counter; the reply is the sum, as ``Number``."""

    key: str
    amount: int


class Forget(Message, frozen=True, kw_only=True, tag="Forget"):
    """Free a posted value."""

    key: str


class GetBoard(Message, frozen=True, kw_only=True, tag="GetBoard"):
    """A call. ``Done``, with the board's memfd beside it."""


class GetSlots(Message, frozen=True, kw_only=True, tag="GetSlots"):
    """A call. ``Slots`` of this node's ``rank``, with their memfds in the same order."""

    rank: int


class SlotCreated(Message, frozen=True, kw_only=True, tag="SlotMade"):
    """A call. The trainer made a slot; its memfd travels beside the message.

    The error is UsageError if memory is short. ``free_share``: the slot can be done without; it is
    taken only if each rank of the node can have as many, and that part of all memory stays free.
    """

    index: int
    size_bytes: int
    free_share: float = 0.0


class SlotReleased(Message, frozen=True, kw_only=True, tag="SlotGone"):
    """The trainer gave up its slot ``index``."""

    index: int


class GetChoices(Message, frozen=True, kw_only=True, tag="GetChoices"):
    """A call.

    ``Choices``, once the keeper has read the log; empty if there is nothing to restore.
    """


class GetSources(Message, frozen=True, kw_only=True, tag="GetSources"):
    """A call, with several nodes. ``Sources`` of a staged snapshot out of ``Choices``."""

    snapshot: SnapshotId


class OpenEpoch(Message, frozen=True, kw_only=True, tag="OpenEpoch"):
    """A call, from rank 0. Open the next epoch, which continues from ``resume``.

    The reply is ``Number``. ``resume`` is None for a fresh start. If the keeper knows the log, it
    gives out the number at once and writes the record afterwards, before the first commit of that
    epoch. ``retention``: what to drop from now on (None: nothing). ``newest``: ``resume`` was the
    best of the last ``Choices``, and the call fails if it no longer is.
    """

    resume: SnapshotId | None
    retention: Retention | None = None
    newest: bool = False


class Decided(Message, frozen=True, kw_only=True, tag="Decided"):
    """From rank 0, with several nodes: what all ranks do at a boundary. See ``Board.decide``."""

    boundary: int
    flags: int


class VerifiedChunks(Message, frozen=True, kw_only=True, tag="Known"):
    """Chunks of the committed snapshot ``base`` that this trainer read and verified.

    Only such chunks may be referenced by a later snapshot, so that damage in a store is not
    passed on.
    """

    base: SnapshotId
    digests: tuple[Digest, ...]
    locations: tuple[ChunkLocation, ...]


class Persist(Message, frozen=True, kw_only=True, tag="Persist"):
    """Make slot ``index``, sealed under ``generation`` and marked as held, durable.

    Every rank submits the same sequence of snapshots.
    """

    snapshot: SnapshotId
    index: int
    generation: int
    tags: tuple[str, ...] = ()
    shared: Mapping[str, tuple[int, str]] = {}
    samples: Mapping[str, tuple[str, str]] = {}


class Refuse(Message, frozen=True, kw_only=True, tag="Refuse"):
    """In place of ``Persist``: this rank cannot give its share."""

    snapshot: SnapshotId
    error: RemoteError


class SetTag(Message, frozen=True, kw_only=True, tag="SetTag"):
    """A call, from rank 0. Tag a durable snapshot; ``Done`` when the record is written."""

    name: str
    snapshot: SnapshotId


class Progress(Message, frozen=True, kw_only=True, tag="Progress"):
    """A run of this trainer on another store than its keeper's has ``completed`` steps.

    The keeper's board does not show them.
    """

    store: str
    completed: int


class Phase(Message, frozen=True, kw_only=True, tag="Phase"):
    """A milestone of a trainer's start, reached at ``at_s`` (CLOCK_MONOTONIC).

    ``entered``, ``group`` (process group made), ``tracked``, ``restored`` or ``first-step``.
    """

    name: str
    at_s: float
    facts: Mapping[str, Fact] = {}


class Finished(Message, frozen=True, kw_only=True, tag="Finished"):
    """The decorated function returned and all is durable.

    The rest of the user's program follows.
    """


# ---- from tools


class GetStatus(Message, frozen=True, kw_only=True, tag="GetStatus"):
    """A call. ``Status``."""


# ---- one-way, from the keeper


class Start(Message, frozen=True, kw_only=True, tag="Start"):
    """To a supervisor: start the trainer of ``attempt``.

    Its process group meets at ``port``, on loopback if ``seating`` is None.
    """

    attempt: int
    port: int
    seating: RankPlacement | None = None


class Kill(Message, frozen=True, kw_only=True, tag="Kill"):
    """To a supervisor: kill the process group of ``attempt``'s trainer, then answer ``Killed``."""

    attempt: int


class Dump(Message, frozen=True, kw_only=True, tag="Dump"):
    """To a supervisor: have the trainer of ``attempt`` write its stacks to ``path``."""

    attempt: int
    path: str


class StartPrepared(Message, frozen=True, kw_only=True, tag="RunAhead"):
    """To a supervisor on a standby: start a prepared trainer now, if the program asks for one."""


class Leave(Message, frozen=True, kw_only=True, tag="Leave"):
    """To a supervisor: kill all trainers, print ``text`` if there is one, exit with ``status``.
    ``futile``: a restart would end the same, so the launcher must not start the program again."""

    status: int
    text: str = ""
    futile: bool = False


class Keep(Message, frozen=True, kw_only=True, tag="Keep"):
    """To a supervisor: keep this slot's memfd, which is beside the message, for the next keeper."""

    rank: int
    index: int
    size_bytes: int


class DropSlot(Message, frozen=True, kw_only=True, tag="Drop"):
    """To a supervisor: close the kept memfd of a slot."""

    rank: int
    index: int


class KeepBoard(Message, frozen=True, kw_only=True, tag="KeepBoard"):
    """To a supervisor: keep the board's memfd, which travels beside the message."""


class Outcome(Message, frozen=True, kw_only=True, tag="Outcome"):
    """To a trainer's ``events``: the result of a submission.

    ``info`` with ``error``: durable, but untagged.
    """

    snapshot: SnapshotId
    info: SnapshotInfo | None = None
    error: RemoteError | None = None


class Fenced(Message, frozen=True, kw_only=True, tag="Fenced"):
    """To a trainer's ``events``: another writer opened a newer epoch; this job is fenced."""

    text: str


class Stop(Message, frozen=True, kw_only=True, tag="Stop"):
    """To trainers' ``events``: the job is preempted.

    Stop at a boundary, durable, within ``grace_s``.
    """

    grace_s: float


class PrintLine(Message, frozen=True, kw_only=True, tag="Tell"):
    """To a supervisor: print one line for people (a recovery, an alarm).

    Without supervisors to a trainer's ``events``, which raises it as an alarm of its own.
    """

    text: str
    alarm: bool = False


AnyMessage = (
    Hello
    | Settings
    | Bye
    | Started
    | Died
    | Killed
    | Preempt
    | SlotKept
    | BoardKept
    | Post
    | Peek
    | Count
    | Forget
    | GetBoard
    | GetSlots
    | SlotCreated
    | SlotReleased
    | GetChoices
    | GetSources
    | OpenEpoch
    | Decided
    | VerifiedChunks
    | Persist
    | Refuse
    | SetTag
    | Failing
    | Progress
    | Phase
    | Finished
    | GetStatus
    | Done
    | Welcome
    | OtherSettings
    | Value
    | Number
    | Slots
    | Sources
    | Choices
    | Status
    | Start
    | Kill
    | Dump
    | StartPrepared
    | Leave
    | Keep
    | DropSlot
    | KeepBoard
    | Outcome
    | Fenced
    | Stop
    | PrintLine
)
"""All messages."""


class _MessageCodec(msgspec.Struct, frozen=True):
    """Makes msgspec build the codec of the union at import, and not with the first message."""

    message: AnyMessage


prepare_decoders(_MessageCodec)


# ---- errors: one rank's error becomes an error of the same class on all ranks

_RANK_PREFIX = re.compile(r"rank (-?[0-9]{1,9}): ")
_BY_CODE = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CkptError)
}


def from_error(error: CkptError, *, rank: int) -> RemoteError:
    """The message for ``error``, which happened on ``rank``.

    An error received from another rank keeps that rank.
    """
    text = str(error)
    prefix = _RANK_PREFIX.match(text)
    if prefix is not None:
        return RemoteError(error.code, text[prefix.end() :], int(prefix[1]))
    return RemoteError(error.code, text, rank)


def to_error(message: RemoteError) -> CkptError:
    """The error that a message describes. An unknown code gives InternalError."""
    return _BY_CODE.get(message.code, InternalError)(
        f"rank {message.rank}: {message.text}" if message.rank >= 0 else message.text
    )
