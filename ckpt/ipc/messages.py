"""What supervisors, trainers and tools say to a keeper, and what it says to them.

Each message is one msgpack map with a ``type`` tag, sent as a frame (``frames``). A message with an ``id`` above 0 is a call:
the keeper answers it with exactly one ``Reply`` of that id, perhaps much later, and answers of one connection may
overtake each other. Everything else is a word that nobody answers. File descriptors travel beside a frame.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckpt.format.canonical import ready
from ckpt.ipc.answers import Choices, Done, Number, Slots, Sources, Status, Value, Welcome
from ckpt.ipc.message import Message, RemoteError
from ckpt.ipc.policy import Policy, Retention
from ckpt.ipc.report import Fact
from ckpt.ipc.seating import Seating
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

WIRE_VERSION = 4
"""Grows with each change of a message; peers of different versions refuse each other."""


# ---- from everybody


class Hello(Message, frozen=True, kw_only=True):
    """First on every connection; a call. Answered with ``Welcome``, or an error that says why the peer isn't wanted.

    ``role``: ``supervisor``, ``trainer`` (its calls), ``events`` (a trainer's second connection, for words of the keeper) or
    ``tool``. ``launch`` names one start of the whole program: all its ranks share it, no other start ever has it.
    ``attempt``: the one that the peer belongs to, 0 for none yet. ``ranks`` is the number of ranks on this node,
    ``rank`` the peer's.
    ``holds``: a supervisor has slots or a board of an earlier keeper, and hands them over before ``Killed``.
    ``agent``: the launcher's own on this node, as ``NodesSpec`` names it to a supervisor: a keeper may outlast it.
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


class Bye(Message, frozen=True, kw_only=True):
    """The peer leaves as planned. A connection that ends without it was cut off."""


# ---- from supervisors


class Started(Message, frozen=True, kw_only=True):
    """A trainer of ``attempt`` runs. ``how``: ``fork``, ``spawn`` or ``prepared``. Times are CLOCK_MONOTONIC seconds."""

    attempt: int
    trainer_pid: int
    how: str
    at_s: float


class Died(Message, frozen=True, kw_only=True):
    """The trainer ended by itself. ``status`` as ``os.waitstatus_to_exitcode``: an exit code, or minus a signal.

    ``overdue``: its supervisor stopped it, because this node may not act at the moment: it did nothing wrong.
    """

    attempt: int
    status: int
    at_s: float
    overdue: bool = False


class Killed(Message, frozen=True, kw_only=True):
    """No process of the attempt's group lives on this rank any more: the answer to ``Kill``."""

    attempt: int


class Preempt(Message, frozen=True, kw_only=True):
    """The node is about to be taken away: stop at a boundary, durable, within ``grace_s``. From supervisors and trainers."""

    grace_s: float


class SlotKept(Message, frozen=True, kw_only=True):
    """To a keeper that is new: a slot that this supervisor holds; its memfd travels beside it."""

    rank: int
    index: int
    size_bytes: int


class BoardKept(Message, frozen=True, kw_only=True):
    """To a keeper that is new: the board; its memfd travels beside it."""


# ---- from trainers


class Post(Message, frozen=True, kw_only=True):
    """Publish ``value`` under ``key`` in the attempt's room."""

    key: str
    value: bytes


class Peek(Message, frozen=True, kw_only=True):
    """A call: ``Value`` of the key, as soon as it is posted, or None after ``wait_s`` seconds."""

    key: str
    wait_s: float = 0.0


class Count(Message, frozen=True, kw_only=True):
    """A call: add to a counter; ``Number`` is the sum."""

    key: str
    amount: int


class Forget(Message, frozen=True, kw_only=True):
    """Free a posted message."""

    key: str


class GetBoard(Message, frozen=True, kw_only=True):
    """A call: ``Done`` with the board's memfd beside it."""


class GetSlots(Message, frozen=True, kw_only=True):
    """A call: ``Slots`` of this node's ``rank``, with their memfds in the same order."""

    rank: int


class SlotMade(Message, frozen=True, kw_only=True):
    """A call: the trainer made a slot for itself; its memfd travels beside it. UsageError where memory is short."""

    index: int
    size_bytes: int


class SlotGone(Message, frozen=True, kw_only=True):
    """The trainer gave up its slot ``index``."""

    index: int


class GetChoices(Message, frozen=True, kw_only=True):
    """A call: ``Choices``, once the keeper has read the log. NotFoundError never: no store means no choices."""


class GetSources(Message, frozen=True, kw_only=True):
    """A call, where the job has several nodes: ``Sources`` of a staged pair that ``Choices`` named."""

    snapshot: SnapshotId


class OpenEpoch(Message, frozen=True, kw_only=True):
    """A call, of rank 0: open the next epoch, going on from ``resume``; ``Number`` is the epoch.

    ``resume`` is None for a fresh start. The number is given out at once where the keeper knows the log; its record follows,
    before the first commit of the epoch. ``retention``: what is to be dropped from now on; None: nothing. ``newest``:
    ``resume`` was the best of the ``Choices`` that came last, and is not to be gone on from where it is that no more.
    """

    resume: SnapshotId | None
    retention: Retention | None = None
    newest: bool = False


class Decided(Message, frozen=True, kw_only=True):
    """Of rank 0, where the job has several nodes: what all ranks do at a boundary, see ``Board.decide``."""

    boundary: int
    flags: int


class Known(Message, frozen=True, kw_only=True):
    """Chunks of the committed snapshot ``base`` that this trainer read and found right: they may be referred to."""

    base: SnapshotId
    digests: tuple[Digest, ...]
    locations: tuple[ChunkLocation, ...]


class Persist(Message, frozen=True, kw_only=True):
    """Make slot ``index``, sealed under ``generation`` and marked as held, durable. Each rank hands in the same sequence."""

    snapshot: SnapshotId
    index: int
    generation: int
    tags: tuple[str, ...] = ()
    shared: Mapping[str, tuple[int, str]] = {}


class Refuse(Message, frozen=True, kw_only=True):
    """Instead of ``Persist``: this rank can't give its share."""

    snapshot: SnapshotId
    error: RemoteError


class SetTag(Message, frozen=True, kw_only=True):
    """A call, of rank 0: tag a durable snapshot; ``Done`` when the record is written."""

    name: str
    snapshot: SnapshotId


class Failing(Message, frozen=True, kw_only=True):
    """The user's code raised, and this trainer is about to die of it.

    ``fingerprint`` is equal for equal exceptions at equal places. ``final``: not worth a restart (a usage error, Ctrl-C).
    """

    kind: str
    text: str
    fingerprint: str
    step: int
    final: bool = False


class Phase(Message, frozen=True, kw_only=True):
    """A point of a trainer's start: ``entered``, ``group`` (process group made), ``tracked``, ``restored``, ``first-step``."""

    name: str
    at_s: float
    facts: Mapping[str, Fact] = {}


class Finished(Message, frozen=True, kw_only=True):
    """The decorated function returned and all is durable; what follows is the rest of the user's program."""


# ---- from tools


class GetStatus(Message, frozen=True, kw_only=True):
    """A call: ``Status``."""


# ---- words of the keeper


class Start(Message, frozen=True, kw_only=True):
    """To a supervisor: start the trainer of ``attempt``; its group meets at ``port``, without ``seating`` on loopback."""

    attempt: int
    port: int
    seating: Seating | None = None


class Kill(Message, frozen=True, kw_only=True):
    """To a supervisor: kill the trainer of ``attempt`` and its whole process group, then answer ``Killed``."""

    attempt: int


class Dump(Message, frozen=True, kw_only=True):
    """To a supervisor: have the trainer of ``attempt`` write its stacks to ``path``."""

    attempt: int
    path: str


class RunAhead(Message, frozen=True, kw_only=True):
    """To a supervisor whose node is a standby: where the program wants prepared trainers, one may run ahead here now."""


class Leave(Message, frozen=True, kw_only=True):
    """To a supervisor: kill what still runs and exit with ``status``; ``text`` says why, for people ("" : say nothing)."""

    status: int
    text: str = ""


class Keep(Message, frozen=True, kw_only=True):
    """To a supervisor: hold this slot's memfd, which travels beside it, for the keeper that may come after this one."""

    rank: int
    index: int
    size_bytes: int


class Drop(Message, frozen=True, kw_only=True):
    """To a supervisor: let go of a slot."""

    rank: int
    index: int


class KeepBoard(Message, frozen=True, kw_only=True):
    """To a supervisor: hold the board's memfd."""


class Outcome(Message, frozen=True, kw_only=True):
    """To a trainer's ``events``: a snapshot that was handed in is settled. ``error`` beside ``info``: durable, but untagged."""

    snapshot: SnapshotId
    info: SnapshotInfo | None = None
    error: RemoteError | None = None


class Fenced(Message, frozen=True, kw_only=True):
    """To a trainer's ``events``: another writer opened a newer epoch; nothing of this job counts any more."""

    text: str


class Stop(Message, frozen=True, kw_only=True):
    """To trainers' ``events``: the job is preempted: stop at a boundary, durable, within ``grace_s``."""

    grace_s: float


class Tell(Message, frozen=True, kw_only=True):
    """To the supervisor of rank 0: print one line for people (a recovery, an alarm)."""

    text: str
    alarm: bool = False


ALL = (
    Hello | Bye | Started | Died | Killed | Preempt | SlotKept | BoardKept | Post | Peek | Count | Forget | GetBoard | GetSlots
    | SlotMade | SlotGone | GetChoices | GetSources | OpenEpoch | Decided | Known | Persist | Refuse | SetTag | Failing
    | Phase | Finished | GetStatus
    | Done | Welcome | Value | Number | Slots | Sources | Choices | Status
    | Start | Kill | Dump | RunAhead | Leave | Keep | Drop | KeepBoard | Outcome | Fenced | Stop | Tell
)  # fmt: skip
"""Every message there is."""


class _Codec(msgspec.Struct, frozen=True):
    """Only to make msgspec build the union's codec once, at import."""

    message: ALL


ready(_Codec)
