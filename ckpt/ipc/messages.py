"""What supervisors, trainers and tools say to a keeper, and what it says to them.

Each message is one msgpack map with a ``type`` tag, sent as a frame (``frames``). A message with an
``id`` above 0 is a call: the keeper answers it with exactly one ``Reply`` of that id, perhaps much
later, and answers of one connection may overtake each other. Everything else is a word that nobody
answers. File descriptors travel beside a frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ckpt import errors
from ckpt.errors import CkptError, InternalError
from ckpt.format.canonical import prepare_decoders
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

# What every message between keepers, supervisors, trainers and tools has in common.


class RemoteError(msgspec.Struct, frozen=True):
    """An error as a message: ``code`` finds its class again, ``text`` are its words, ``rank`` says
    whose it was."""

    code: str
    text: str
    rank: int


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of all messages. ``id`` above 0: a call."""

    id: int = 0


# What a keeper tells tools about itself and its job.

Fact = str | int | float | bool | None


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One slot: what it holds sealed (None: nothing), and whether an upload holds it."""

    index: int
    size_bytes: int
    snapshot: SnapshotId | None
    held: bool


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rank as its keeper sees it. ``idle_s``: since its last boundary."""

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
    """One node of the job's newest epoch; ``first_rank`` -1 and no ``ranks``: a standby. ``here``:
    the keeper's own node.

    ``mirrored``: the newest pair that all nodes have on others; of a standby the newest of which it
    has all that it is to keep (None: nothing, or not known to this keeper).
    """

    node: str
    here: bool
    first_rank: int
    ranks: int
    mirrored: SnapshotId | None


class KeeperReport(msgspec.Struct, frozen=True, kw_only=True):
    """One keeper. ``recoveries``: the last ones, oldest first, as facts. ``rss_bytes``: its own
    memory besides slots."""

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
    """Of several nodes: what this one has sent to others so far, to be kept there, and came."""
    refused: Mapping[str, int] = {}
    """Of several nodes: what was turned away, by kind; ``line`` counts connections, the others
    requests for lent memory."""


# Where a node's ranks are in a job of several nodes, and where what they staged is.


class RankPlacement(msgspec.Struct, frozen=True):
    """This node's ranks are the ones from ``first_rank`` on; rank 0 is at ``host``. ``node`` counts
    from 0."""

    host: str
    first_rank: int
    world_size: int
    node: int
    nodes: int


class Source(msgspec.Struct, frozen=True):
    """Where one rank's share of a staged pair is. ``local``: the local rank whose slot has it, -1
    for none.

    ``slots`` and ``mirrors``: the addresses of nodes that lend it, out of a slot or as a mirror.
    """

    local: int = -1
    slots: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()


prepare_decoders(RankPlacement, Source)


# What a keeper answers to what it is asked. The questions are in ``messages``.


class Reply(Message, frozen=True, kw_only=True, tag="Reply"):
    """Base of answers; ``error`` is set where the call failed, and nothing else then counts."""

    error: RemoteError | None = None


class Done(Reply, frozen=True, kw_only=True, tag="Done"):
    """The call was carried out (or failed)."""


class Welcome(Reply, frozen=True, kw_only=True, tag="Welcome"):
    """``boot`` is random for each keeper. ``new``: it knows nothing of the peer's attempt, so hand
    over what you hold.

    ``seating``: where the node's ranks are in the peer's attempt, where the job has several nodes.
    """

    boot: str
    pid: int
    attempt: int
    new: bool = False
    seating: RankPlacement | None = None


class Value(Reply, frozen=True, kw_only=True, tag="Value"):
    """What is posted under the key, or None."""

    value: bytes | None


class Number(Reply, frozen=True, kw_only=True, tag="Number"):
    """A count or an epoch. ``origin``: of an epoch, what its staged indexes carry, since numbers
    alone are given out twice."""

    number: int
    origin: str = ""


class SlotEntry(msgspec.Struct, frozen=True):
    """One slot that the keeper holds."""

    index: int
    size_bytes: int


class Slots(Reply, frozen=True, kw_only=True, tag="Slots"):
    """The slots of one rank, memfds beside them in the same order."""

    slots: tuple[SlotEntry, ...]


class Sources(Reply, frozen=True, kw_only=True, tag="Sources"):
    """Where the share of each rank of the pair's world is; empty where the pair isn't known."""

    ranks: tuple[Source, ...]
    epoch: int = 0


class Choice(msgspec.Struct, frozen=True):
    """A snapshot to restore. ``tier``: ``staged`` (all ranks' slots hold it) or ``durable``."""

    snapshot: SnapshotId
    tier: str


class Choices(Reply, frozen=True, kw_only=True, tag="Choices"):
    """What can be restored, best first: the line of the newest epoch."""

    choices: tuple[Choice, ...]


class Status(Reply, frozen=True, kw_only=True, tag="Status"):
    """What ``ckpt ps`` and ``ckpt top`` show: see ``report``."""

    report: KeeperReport | None


# What a keeper needs to know of its user's choices: about failures, and how long snapshots are
# kept.


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor's user chose about failures; equal on all ranks.

    ``same_error_max``: the same exception at the same step that often in a row is a bug.
    ``stuck_max``: that many failures in a row without one step completed end the job. ``hang_s``:
    the least time without a step that counts as a hang (0: never). ``grace_s``: how long a
    preempted job may take. ``linger_s``: how long slots are kept for a program that was killed.
    """

    same_error_max: int = 2
    stuck_max: int = 5
    hang_s: float = 600.0
    grace_s: float = 25.0
    linger_s: float = 60.0


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """What the user of an epoch's writer chose to keep: the policy's text, and how long the bytes
    of dropped snapshots stay."""

    keep: str
    grace_s: float


WIRE_VERSION = 4
"""Grows with each change of a message; peers of different versions refuse each other."""


# ---- from everybody


class Hello(Message, frozen=True, kw_only=True, tag="Hello"):
    """First on every connection; a call. Answered with ``PeerWelcome``, or an error that says why
    the peer isn't wanted.

    ``role``: ``supervisor``, ``trainer`` (its calls), ``events`` (a trainer's second connection,
    for words of the keeper) or ``tool``. ``launch`` names one start of the whole program: all its
    ranks share it, no other start ever has it. ``attempt``: the one that the peer belongs to, 0 for
    none yet. ``ranks`` is the number of ranks on this node, ``rank`` the peer's. ``holds``: a
    supervisor has slots or a board of an earlier keeper, and hands them over before ``Killed``.
    ``agent``: the launcher's own on this node, as ``NodesSpec`` names it to a supervisor: a keeper
    may outlast it.
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


class Bye(Message, frozen=True, kw_only=True, tag="Bye"):
    """The peer leaves as planned. A connection that ends without it was cut off."""


# ---- from supervisors


class Started(Message, frozen=True, kw_only=True, tag="Started"):
    """A trainer of ``attempt`` runs. ``how``: ``fork``, ``spawn`` or ``prepared``. Times are
    CLOCK_MONOTONIC seconds."""

    attempt: int
    trainer_pid: int
    how: str
    at_s: float


class Died(Message, frozen=True, kw_only=True, tag="Died"):
    """The trainer ended by itself. ``status`` as ``os.waitstatus_to_exitcode``: an exit code, or
    minus a signal.

    ``overdue``: its supervisor stopped it, because this node may not act at the moment: it did
    nothing wrong.
    """

    attempt: int
    status: int
    at_s: float
    overdue: bool = False


class Killed(Message, frozen=True, kw_only=True, tag="Killed"):
    """No process of the attempt's group lives on this rank any more: the answer to ``Kill``."""

    attempt: int


class Preempt(Message, frozen=True, kw_only=True, tag="Preempt"):
    """The node is about to be taken away: stop at a boundary, durable, within ``grace_s``. From
    supervisors and trainers."""

    grace_s: float


class SlotKept(Message, frozen=True, kw_only=True, tag="SlotKept"):
    """To a keeper that is new: a slot that this supervisor holds; its memfd travels beside it."""

    rank: int
    index: int
    size_bytes: int


class BoardKept(Message, frozen=True, kw_only=True, tag="BoardKept"):
    """To a keeper that is new: the board; its memfd travels beside it."""


# ---- from trainers


class Post(Message, frozen=True, kw_only=True, tag="Post"):
    """Publish ``value`` under ``key`` in the attempt's room."""

    key: str
    value: bytes


class Peek(Message, frozen=True, kw_only=True, tag="Peek"):
    """A call: ``Value`` of the key, as soon as it is posted, or None after ``wait_s`` seconds."""

    key: str
    wait_s: float = 0.0


class Count(Message, frozen=True, kw_only=True, tag="Count"):
    """A call: add to a counter; ``Number`` is the sum."""

    key: str
    amount: int


class Forget(Message, frozen=True, kw_only=True, tag="Forget"):
    """Free a posted message."""

    key: str


class GetBoard(Message, frozen=True, kw_only=True, tag="GetBoard"):
    """A call: ``PutDone`` with the board's memfd beside it."""


class GetSlots(Message, frozen=True, kw_only=True, tag="GetSlots"):
    """A call: ``Slots`` of this node's ``rank``, with their memfds in the same order."""

    rank: int


class SlotCreated(Message, frozen=True, kw_only=True, tag="SlotMade"):
    """A call: the trainer made a slot for itself; its memfd travels beside it. UsageError where
    memory is short."""

    index: int
    size_bytes: int


class SlotReleased(Message, frozen=True, kw_only=True, tag="SlotGone"):
    """The trainer gave up its slot ``index``."""

    index: int


class GetChoices(Message, frozen=True, kw_only=True, tag="GetChoices"):
    """A call: ``Choices``, once the keeper has read the log. NotFoundError never: no store means no
    choices."""


class GetSources(Message, frozen=True, kw_only=True, tag="GetSources"):
    """A call, where the job has several nodes: ``MeshSources`` of a staged pair that ``Choices``
    named."""

    snapshot: SnapshotId


class OpenEpoch(Message, frozen=True, kw_only=True, tag="OpenEpoch"):
    """A call, of rank 0: open the next epoch, going on from ``resume``; ``Number`` is the epoch.

    ``resume`` is None for a fresh start. The number is given out at once where the keeper knows the
    log; its record follows, before the first commit of the epoch. ``retention``: what is to be
    dropped from now on; None: nothing. ``newest``: ``resume`` was the best of the ``Choices`` that
    came last, and is not to be gone on from where it is that no more.
    """

    resume: SnapshotId | None
    retention: Retention | None = None
    newest: bool = False


class Decided(Message, frozen=True, kw_only=True, tag="Decided"):
    """Of rank 0, where the job has several nodes: what all ranks do at a boundary, see
    ``Board.decide``."""

    boundary: int
    flags: int


class VerifiedChunks(Message, frozen=True, kw_only=True, tag="Known"):
    """Chunks of the committed snapshot ``base`` that this trainer read and found right: they may be
    referred to."""

    base: SnapshotId
    digests: tuple[Digest, ...]
    locations: tuple[ChunkLocation, ...]


class Persist(Message, frozen=True, kw_only=True, tag="Persist"):
    """Make slot ``index``, sealed under ``generation`` and marked as held, durable. Each rank hands
    in the same sequence."""

    snapshot: SnapshotId
    index: int
    generation: int
    tags: tuple[str, ...] = ()
    shared: Mapping[str, tuple[int, str]] = {}


class Refuse(Message, frozen=True, kw_only=True, tag="Refuse"):
    """Instead of ``Persist``: this rank can't give its share."""

    snapshot: SnapshotId
    error: RemoteError


class SetTag(Message, frozen=True, kw_only=True, tag="SetTag"):
    """A call, of rank 0: tag a durable snapshot; ``PutDone`` when the record is written."""

    name: str
    snapshot: SnapshotId


class Failing(Message, frozen=True, kw_only=True, tag="Failing"):
    """The user's code raised, and this trainer is about to die of it.

    ``fingerprint`` is equal for equal exceptions at equal places. ``final``: not worth a restart (a
    usage error, Ctrl-C).
    """

    kind: str
    text: str
    fingerprint: str
    step: int
    final: bool = False


class Phase(Message, frozen=True, kw_only=True, tag="Phase"):
    """A point of a trainer's start: ``entered``, ``group`` (process group made), ``tracked``,
    ``restored``, ``first-step``."""

    name: str
    at_s: float
    facts: Mapping[str, Fact] = {}


class Finished(Message, frozen=True, kw_only=True, tag="Finished"):
    """The decorated function returned and all is durable; what follows is the rest of the user's
    program."""


# ---- from tools


class GetStatus(Message, frozen=True, kw_only=True, tag="GetStatus"):
    """A call: ``Status``."""


# ---- words of the keeper


class Start(Message, frozen=True, kw_only=True, tag="Start"):
    """To a supervisor: start the trainer of ``attempt``; its group meets at ``port``, without
    ``seating`` on loopback."""

    attempt: int
    port: int
    seating: RankPlacement | None = None


class Kill(Message, frozen=True, kw_only=True, tag="Kill"):
    """To a supervisor: kill the trainer of ``attempt`` and its whole process group, then answer
    ``Killed``."""

    attempt: int


class Dump(Message, frozen=True, kw_only=True, tag="Dump"):
    """To a supervisor: have the trainer of ``attempt`` write its stacks to ``path``."""

    attempt: int
    path: str


class StartPrepared(Message, frozen=True, kw_only=True, tag="RunAhead"):
    """To a supervisor whose node is a standby: where the program wants prepared trainers, one may
    run ahead here now."""


class Leave(Message, frozen=True, kw_only=True, tag="Leave"):
    """To a supervisor: kill what still runs and exit with ``status``; ``text`` says why, for people
    ("" : say nothing)."""

    status: int
    text: str = ""


class Keep(Message, frozen=True, kw_only=True, tag="Keep"):
    """To a supervisor: hold this slot's memfd, which travels beside it, for the keeper that may
    come after this one."""

    rank: int
    index: int
    size_bytes: int


class DropSlot(Message, frozen=True, kw_only=True, tag="Drop"):
    """To a supervisor: let go of a slot."""

    rank: int
    index: int


class KeepBoard(Message, frozen=True, kw_only=True, tag="KeepBoard"):
    """To a supervisor: hold the board's memfd."""


class Outcome(Message, frozen=True, kw_only=True, tag="Outcome"):
    """To a trainer's ``events``: a snapshot that was handed in is settled. ``error`` beside
    ``info``: durable, but untagged."""

    snapshot: SnapshotId
    info: SnapshotInfo | None = None
    error: RemoteError | None = None


class Fenced(Message, frozen=True, kw_only=True, tag="Fenced"):
    """To a trainer's ``events``: another writer opened a newer epoch; nothing of this job counts
    any more."""

    text: str


class Stop(Message, frozen=True, kw_only=True, tag="Stop"):
    """To trainers' ``events``: the job is preempted: stop at a boundary, durable, within
    ``grace_s``."""

    grace_s: float


class PrintLine(Message, frozen=True, kw_only=True, tag="Tell"):
    """To the supervisor of rank 0: print one line for people (a recovery, an alarm)."""

    text: str
    alarm: bool = False


AnyMessage = (
    Hello
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
    | Phase
    | Finished
    | GetStatus
    | Done
    | Welcome
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
"""Every message there is."""


class _MessageCodec(msgspec.Struct, frozen=True):
    """Only to make msgspec build the union's codec once, at import."""

    message: AnyMessage


prepare_decoders(_MessageCodec)


# An error of one rank, told to all: its code and words travel, and become the same kind of error
# again.

_CAME_FROM = re.compile(r"rank (-?[0-9]{1,9}): ")
_BY_CODE = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CkptError)
}


def from_error(error: CkptError, *, rank: int) -> RemoteError:
    """The message for ``error``, met on ``rank``. One that came from another rank keeps that
    rank."""
    text = str(error)
    came = _CAME_FROM.match(text)
    if came is not None:
        return RemoteError(error.code, text[came.end() :], int(came[1]))
    return RemoteError(error.code, text, rank)


def to_error(message: RemoteError) -> CkptError:
    """The error that a message stands for."""
    return _BY_CODE.get(message.code, InternalError)(
        f"rank {message.rank}: {message.text}" if message.rank >= 0 else message.text
    )
