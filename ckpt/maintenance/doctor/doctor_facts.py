"""What an examination of stores found, and what is to be thought of it. Only facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "note", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Latency:
    """How long one kind of small operation took, over ``count`` of them."""

    median_s: float
    p95_s: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """What lies in a store already.

    ``kind``: ``empty``; ``store``: a ckpt store; ``headless``: a log without a readable ``ckpt.json``; ``foreign``: objects
    that are not ours; ``unknown``: it could not be read, see ``problem``.
    """

    kind: Literal["empty", "store", "headless", "foreign", "unknown"]
    job: str = ""
    store_id: str = ""
    log_id: str = ""
    snapshots: int = 0
    newest: str = ""
    next_seq: int = 0
    members: tuple[str, ...] = ()
    """The ids of the stores that its log names; none where it names none."""
    write_quorum: int = 0
    hole: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFindings:
    """What was found out about one store by using it. Times are None where the operation was not tried or failed.

    ``failures``: operation to why it failed. ``list_after_put``, ``list_after_delete``: whether a list that was begun after the
    operation's return told of it; ``other_client``: whether another connection's did. ``skew_s``: by how much the store's clock
    is ahead of ours, ``skew_unsure_s`` how far that can be off. ``same_as``: other stores of the examination, by number, that
    turned out to be this very place. ``leftovers``: probe objects that could not be removed.
    """

    url: str
    folder: bool = False
    failures: Mapping[str, str] = field(default_factory=dict)
    create_only: bool | None = None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    read_back_right: bool | None = None
    list_after_put: bool | None = None
    list_after_delete: bool | None = None
    other_client: bool | None = None
    skew_s: float | None = None
    skew_unsure_s: float = 0.0
    free_bytes: int | None = None
    holds: Holds = Holds(kind="unknown")
    same_as: tuple[int, ...] = ()
    leftovers: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether anything worked at all."""
        return "reach" not in self.failures


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to know: how grave, a stable word for programs, which store (None: all together), what is, what to do."""

    level: Level
    code: str
    store: int | None
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """All advice, gravest first. ``exit_code``: 0 well (notes and warnings included), 2 these stores can't be used so, 11 some
    do not answer or deny, 20 damage."""

    advice: tuple[Advice, ...]
    write_quorum: int
    answers_min: int
    exit_code: int

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return self.exit_code == 0
