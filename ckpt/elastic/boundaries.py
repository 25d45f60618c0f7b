"""Boundaries of steps: milestones, the memory tier, optimizer steps, and exits of loops."""

from __future__ import annotations

import dis
import gc
import inspect
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from types import FrameType, GeneratorType

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ckpt.elastic.schedule import MemoryPace
from ckpt.errors import UsageError
from ckpt.ipc.board import STAGE, Board
from ckpt.values import TrainerPhase

# ---- milestones of the start


class Milestones:
    """When this trainer reached the milestones of its start, for the report of a recovery.

    They are kept until there is somewhere to report them. Names are those of ``messages.Phase``.
    """

    def __init__(self) -> None:
        self._unreported: list[tuple[str, float]] = []
        self._names: set[str] = set()

    def reach(self, name: str) -> None:
        """This milestone is reached now; only the first time counts."""
        if name not in self._names:
            self._names.add(name)
            self._unreported.append((name, time.monotonic()))

    def report_to(self, report: Callable[[str, float], None]) -> None:
        """Report the milestones reached since the last call."""
        unreported, self._unreported = self._unreported, []
        for name, at_s in unreported:
            report(name, at_s)


# ---- the memory tier: which boundaries are staged in memory only
#
# Rank 0 decides for the whole job, through the board. At the end of each boundary it publishes what
# happens at the next one. A rank that reaches that boundary has left the one before it, and if the
# ranks of a training depend on each other, no rank completes a step that rank 0 has not begun: so
# the decision is there in time and no rank waits. A rank that finds no decision (its ranks run
# independently) takes no snapshot; its slots still hold an older complete one.
#
# With several nodes a decision travels through keepers, so it is published one boundary earlier.
# What other nodes have sealed is known late, so the next snapshot waits until the last one is known
# to be complete.

DECIDED_AHEAD = 2
"""With several nodes, rank 0 decides for the boundary after the next one."""

INCOMPLETE_AFTER_S = 2.0
"""A snapshot that is not complete on all nodes by then never will be.

Some rank had no free slot for it.
"""


class MemoryTier:
    """Decides at which boundaries a snapshot is staged in memory only.

    Rank 0 decides for the whole job and publishes through the board. ``every`` is the number of
    boundaries from one staged snapshot to the next; 0 for none, None for as many as keep its cost
    small, as rank 0 measures it. ``rank`` is the local rank;
    ``leads``: this is rank 0 of the job. ``forward_decision`` sends a boundary and its decision
    to other nodes (None: there are none).
    """

    def __init__(
        self,
        board: Board,
        *,
        rank: int,
        every: int | None,
        leads: bool | None = None,
        forward_decision: Callable[[int, int], object] | None = None,
    ) -> None:
        self._board = board
        self._own = board.rank(rank)
        self._leads = rank == 0 if leads is None else leads
        self._forward_decision = forward_decision
        self._pace = MemoryPace() if every is None else None
        self._every = 1 if every is None else every
        self._staged_at: int | None = None
        self._at = 0
        self._decided = 0
        self._last_stage = 0
        self._last_stage_s = 0.0

    def begin(self, completed: int) -> None:
        """Training starts with ``completed`` steps done."""
        self._staged_at = self._at = self._decided = self._last_stage = completed
        self._own.attempt = self._board.attempt
        self._own.phase = TrainerPhase.TRAINING
        self._own.beat(completed)
        self._decide_next(completed)

    def should_stage(self, completed: int, *, since: int) -> bool:
        """Whether all ranks stage this boundary; ``since`` is the previous boundary."""
        return self._every > 0 and self._board.decision(since + 1) == STAGE and completed > since

    def complete_boundary(self, completed: int, *, staged: bool) -> None:
        """This boundary is done. Rank 0 publishes the decision for the next one."""
        if staged:
            self._staged_at = completed
            self._own.staged += 1
        self._own.beat(completed)
        self._own.first_step_done = True
        self._decide_next(completed)
        self._at = completed

    def copied(self, completed: int, *, began_s: float, ended_s: float) -> MemoryPace | None:
        """This boundary was staged for memory alone, in that time. Returns the pace if its interval
        has changed, on rank 0.
        """
        pace = self._pace
        if pace is None or not self._leads:
            return None
        changed = pace.copied(completed, began_s=began_s, ended_s=ended_s)
        self._every = pace.every
        return pace if changed else None

    def interrupted(self) -> None:
        """Something else than a step took time: a snapshot that becomes durable, or a pause."""
        if self._pace is not None:
            self._pace.interrupted()

    def count_skipped(self) -> None:
        """No slot was free at a boundary that was to be staged."""
        self._own.skipped += 1

    def set_phase(self, phase: TrainerPhase) -> None:
        """Steps pause for a reason, or resume (``TrainerPhase.TRAINING``)."""
        self.interrupted()
        self._own.phase = phase
        self._own.beat(self._own.completed or 0)

    def _decide_next(self, completed: int) -> None:
        if not self._leads or not self._every:
            return
        assert self._staged_at is not None, "begun"
        if self._forward_decision is not None:
            self._decide_for_all_nodes(completed, self._forward_decision)
            return
        due = completed + 1 - self._staged_at >= self._every
        # If a rank is still before rank 0's last boundary, the others would fill their slots while
        # they wait for it.
        self._board.decide(completed + 1, STAGE if due and self._slowest() >= self._at else 0)

    def _decide_for_all_nodes(self, completed: int, forward: Callable[[int, int], object]) -> None:
        for boundary in range(max(self._decided, completed) + 1, completed + DECIDED_AHEAD + 1):
            due = boundary - self._last_stage >= self._every and self._last_is_settled()
            flags = STAGE if due else 0
            self._board.decide(boundary, flags)
            forward(boundary, flags)
            self._decided = boundary
            if due:
                self._last_stage, self._last_stage_s = boundary, time.monotonic()

    def _last_is_settled(self) -> bool:
        """Whether the last snapshot is complete on all nodes, or never will be."""
        if not self._last_stage_s or time.monotonic() - self._last_stage_s > INCOMPLETE_AFTER_S:
            return True
        # Steps are read before slots: a rank that is past the boundary and does not hold the
        # snapshot did not take it, for instance because the decision arrived late.
        steps = [rank.completed for rank in self._board.all_ranks()]
        complete = self._board.newest_complete()
        if complete is not None and complete.step >= self._last_stage:
            return True
        return all(step is not None and step > self._last_stage for step in steps)

    def _slowest(self) -> int:
        """The boundary of the slowest rank."""
        steps = [rank.completed for rank in self._board.all_ranks()]
        return min(self._at if step is None else step for step in steps)


# ---- snapshot points: boundaries at which a tracked optimizer has stepped
#
# While gradients are accumulated they are part of the state, and gradients are not stored: training
# restored from such a boundary would differ.


class StepWatch:
    """Watches tracked optimizers by their post-step hooks, to find snapshot points."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._watched: set[int] = set()
        self._stepped = False
        self.was_snapshot_point = True
        """Whether the last boundary was a snapshot point."""

    def add(self, items: Mapping[str, object]) -> None:
        """Watch every optimizer among ``items``, including nested ones."""
        for optimizer in _optimizers(items):
            if id(optimizer) not in self._watched:
                self._watched.add(id(optimizer))
                self._handles.append(optimizer.register_step_post_hook(self._on_step))

    def at_snapshot_point(self) -> bool:
        """Whether this boundary is a snapshot point; call it once per boundary.

        True if no optimizer is watched.
        """
        self.was_snapshot_point = self._stepped or not self._watched
        self._stepped = False
        return self.was_snapshot_point

    @property
    def stepped(self) -> bool:
        """Whether an optimizer stepped since the last boundary."""
        return self._stepped

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_step(
        self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self._stepped = True


def _optimizers(value: object) -> Iterator[Optimizer]:
    match value:
        case Optimizer():
            yield value
        case Mapping():
            for inner in value.values():
                yield from _optimizers(inner)
        case list() | tuple():
            for inner in value:
                yield from _optimizers(inner)


# ---- what a run leaves unprotected
#
# A program that protects nothing ends as well as one that protects everything, until it is killed.

NEVER_STEPPED_AFTER = 100
"""After so many boundaries without one step of a tracked optimizer an alarm is emitted; fewer are
common while gradients are accumulated.
"""

_ANY_LOOP = (
    "write `for step in run.steps(total):`, or call run.completed(step + 1) at the end of each "
    "step of a loop of your own"
)


class ProtectionWatch:
    """Notes what a program did with its run, and says in which ways that protects nothing."""

    def __init__(self) -> None:
        self._items: list[str] = []
        self._optimizers = False
        self._boundaries = 0
        self._points = 0
        self._first: int | None = None
        self._looped = False
        self._early: list[str] = []

    def tracked(self, items: Mapping[str, object]) -> None:
        """These items are tracked."""
        self._items += items
        self._optimizers |= any(True for _ in _optimizers(items))

    def looped(self) -> None:
        """A loop began, even if no step was left for it."""
        self._looped = True

    def saved_early(self, tag: str | None) -> None:
        """A snapshot was asked for before the first boundary."""
        self._early.append(f"run.save({tag!r})" if tag is not None else "run.save()")

    def boundary(self, completed: int, *, point: bool) -> str | None:
        """A boundary was passed, which was a snapshot point or not; returns what to tell now."""
        self._first = completed if self._first is None else self._first
        self._boundaries += 1
        self._points += point
        gap = self._without_points() if self._boundaries == NEVER_STEPPED_AFTER else None
        return f"{gap} (training goes on)" if gap is not None else None

    def gaps(self) -> list[str]:
        """At the function's end: each way in which it protected nothing, and what to change."""
        gaps = [self._without_items(), self._without_steps(), self._without_points()]
        return [gap for gap in [*gaps, self._with_early_saves()] if gap is not None]

    def _without_items(self) -> str | None:
        if self._items:
            return None
        remedy = "call run.track(model=model, optimizer=optimizer) before the first step"
        if not self._boundaries:
            return (
                "nothing of this call is protected: it tracked nothing and completed no step; "
                f"{remedy}, and {_ANY_LOOP}"
            )
        return (
            "nothing is tracked, so snapshots hold the random number generators alone. "
            f"boundaries={self._boundaries}; {remedy}"
        )

    def _without_steps(self) -> str | None:
        if not self._items or self._boundaries or self._looped:
            return None
        return (
            "items are tracked, but no step was completed, so nothing was saved on the way. "
            f"items={sorted(self._items)}; {_ANY_LOOP}"
        )

    def _without_points(self) -> str | None:
        if not self._optimizers or not self._boundaries or self._points:
            return None
        return (
            "no tracked optimizer has stepped, and a boundary without an optimizer's step is taken "
            "for gradient accumulation: no snapshot was taken there. "
            f"boundaries={self._boundaries}; track the optimizer whose step() the program calls, "
            "or none: then every boundary counts"
        )

    def _with_early_saves(self) -> str | None:
        if not self._early:
            return None
        held = "at the function's end" if self._first is None else f"after step {self._first}"
        return (
            f"{', '.join(self._early)} came before the first step, so the state {held} was saved, "
            "not that of the call; call it in the loop, in the body of the step that is meant"
        )


# ---- loop exits: by ``break`` or ``return``, or by an exception
#
# ``break`` completes the current body of the loop; an exception does not. Python just closes the
# generator in both cases. But at that moment the frame that drops the generator is at the
# instruction that drops it: for ``break`` and ``return`` the one that pops the iterator off the
# stack; for an exception the one that raised; ``FOR_ITER`` or ``END_FOR`` if an enclosing iterator
# (``zip``) was exhausted. A frame that merely holds the last reference (in a variable, or the
# traceback of a caught exception) may be at any instruction, so only the frame whose ``for`` asks
# the generator counts: ``consumer_frame`` finds it at each step. In doubt the answer is "not by
# break": that repeats one step, and never counts half a step.

_DROPS = frozenset({"POP_TOP", "POP_ITER"})
_CACHE = 0
_FOR_ITER = dis.opmap["FOR_ITER"]
_GET_ITER = dis.opmap["GET_ITER"]
_SEND = dis.opmap.get("SEND", dis.opmap.get("YIELD_FROM", -1))
_DRY = frozenset({"FOR_ITER", "END_FOR"})


class Loop:
    """One loop over a run's steps: how its elements reach its body, and how it is left.

    ``generator`` yields the elements; ``direct``: a ``for`` statement took it by itself, so that
    nothing else holds it.
    """

    def __init__(self, *, direct: bool) -> None:
        self._direct = direct
        self._generator: weakref.ref[Generator[int, None, None]] | None = None
        self._begun = False
        self._consumer: int | None = None
        self._dry_completes = False

    def begin(self, generator: Generator[int, None, None]) -> Generator[int, None, None]:
        """Loop over ``generator``, which calls the other methods."""
        self._generator = weakref.ref(generator)
        return generator

    def ask(self, frame: FrameType) -> None:
        """The generator is about to yield to ``frame``, its caller's.

        The first time, unless the loop is direct, it looks through all objects of the process:
        about 20 ms for 200,000. Raises UsageError if the end of its bodies could not be told.
        """
        self._consumer = consumer_frame(frame)
        if self._begun:
            return
        self._begun = True
        between = _frames_between(frame)
        if between is None or (self._direct and not between):
            return
        if self._generator is not None:
            self._dry_completes = _examine(self._generator, between)

    def completes(self, frame: FrameType) -> bool:
        """Whether closing the generator ends a complete body; ``frame`` is its caller's."""
        if left_by_break(frame, consumer=self._consumer):
            return True
        return self._dry_completes and was_exhausted(frame)


class StepIterator(Iterator[int]):
    """What ``run.steps`` returns: each ``for`` statement over it gets a generator that nothing else
    holds, so that a ``break`` closes it at once even where this object is in a variable or a
    progress bar.
    """

    def __init__(self, make: Callable[[Loop], Generator[int, None, None]]) -> None:
        self._make = make
        self._by_hand: Iterator[int] | None = None

    def __iter__(self) -> Iterator[int]:
        return self._new(direct=_instruction(sys._getframe(1)) == _GET_ITER)

    def __next__(self) -> int:
        if self._by_hand is None:
            self._by_hand = self._new(direct=False)
        return next(self._by_hand)

    def _new(self, *, direct: bool) -> Iterator[int]:
        loop = Loop(direct=direct)
        return loop.begin(self._make(loop))


# What stands between the generator and the body: other generators (a progress bar), and iterators
# written in C (``zip``), which have no frame. A variable that also holds one of them keeps the
# generator open after ``break``. The garbage collector knows which objects refer to which; what it
# does not see are frames that run. So of all references to the generator and to what holds it,
# those that no other of these objects explains must be the ``for`` statements in between.

_HOLDERS_MAX = 64
_PLAIN_LOOP = (
    "write `for step in run.steps(total):` and take what else the body needs inside, with "
    "`next(batches)` where `batches = iter(loader)` stands before the loop"
)


def _examine(generator: weakref.ref[Generator[int, None, None]], between: list[FrameType]) -> bool:
    """Whether the body is complete when an iterator around ``generator`` runs dry.

    ``between``: the frames of generators between it and the body. Raises UsageError if that can't
    be known, or if the generator outlives its loop.
    """
    holders = _holders(generator, between)
    dry_completes = _dry_completes(holders)
    # References that variables of this module still had would count: hence the weak one above.
    if len(holders) >= _HOLDERS_MAX or _is_held_outside(holders, between):
        raise UsageError(
            "the loop's iterator is also held elsewhere, in a variable or an object, so a break "
            "would not be seen and the step that it completes would be lost; write the iterator in "
            f"the for statement itself, or {_PLAIN_LOOP}"
        )
    return dry_completes


def _dry_completes(holders: list[object]) -> bool:
    """Whether the body is complete when an iterator among ``holders`` runs dry.

    It is if that iterator is asked before the steps are, as ``zip`` does with those before them.
    Raises UsageError if that can't be known.
    """
    before = after = False
    for holder in holders:
        name = type(holder).__name__
        if isinstance(holder, zip | map):
            inner = holder.__reduce__()[1]
            parts = inner[1:] if isinstance(holder, map) else inner
            place = next(n for n, part in enumerate(parts) if any(part is one for one in holders))
            before |= place > 0
            after |= place < len(parts) - 1
        elif isinstance(holder, filter) or type(holder).__module__ == "itertools":
            raise UsageError(
                f"{name}() around run.steps() passes over steps, or ends without saying that the "
                f"last one is complete. iterator={name}; {_PLAIN_LOOP}"
            )
    if before and after:
        raise UsageError(
            "whichever iterator of zip() runs dry first decides whether the last step is "
            "complete, and that can't be seen; put run.steps() first: "
            f"zip(run.steps(total), ...), or {_PLAIN_LOOP}"
        )
    return before


def _frames_between(frame: FrameType | None) -> list[FrameType] | None:
    """The frames of generators between a generator, whose caller's is ``frame``, and the body.

    None if anything else asks it, such as a method or ``next``: nothing is known of that.
    """
    between: list[FrameType] = []
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        if _instruction(frame) not in (_FOR_ITER, _SEND):
            return None
        between.append(frame)
        frame = frame.f_back
    return between if frame is not None and _instruction(frame) == _FOR_ITER else None


def _holders(
    generator: weakref.ref[Generator[int, None, None]], between: list[FrameType]
) -> list[object]:
    """The generator, those of ``between``, and all that refers to one of these.

    Not more than _HOLDERS_MAX: so many hold what is in a variable of a module.
    """
    holders: list[object] = [generator()]
    holders += [
        one
        for frame in between
        for one in gc.get_referrers(frame)
        if isinstance(one, GeneratorType) and one.gi_frame is frame
    ]
    skipped = {id(holders), id(between), *(id(frame.f_locals) for frame in between)}
    known = {id(one) for one in holders}
    for one in holders:  # it grows meanwhile
        for referrer in gc.get_referrers(one):
            if id(referrer) in known or id(referrer) in skipped or isinstance(referrer, FrameType):
                continue
            if len(holders) >= _HOLDERS_MAX:
                return holders
            known.add(id(referrer))
            holders.append(referrer)
    return holders


def _is_held_outside(holders: list[object], between: list[FrameType]) -> bool:
    """Whether anything refers to one of ``holders`` but themselves and the ``for`` statements."""
    # Comprehensions, since a loop's variable would be one more reference to the last holder.
    explained = Counter(
        id(inner)
        for holder in holders
        if not isinstance(holder, GeneratorType)  # a running one shows nothing, or its frame
        for inner in gc.get_referents(holder)
    )
    for frame in between:
        # Up to Python 3.12 the frame keeps this dict, which then is a second reference to each.
        copies = 2 if frame.f_locals is frame.f_locals else 1
        explained.update(id(value) for value in [*frame.f_locals.values()] * copies)
    sample: list[object] = [object()]
    own = sum(sys.getrefcount(one) for one in sample)  # of a list, its loop and the call
    unexplained = sum(sys.getrefcount(one) - own - explained[id(one)] for one in holders)
    return unexplained > len(between) + 1


def consumer_frame(frame: FrameType | None) -> int | None:
    """The identity of the frame whose ``for`` asks a generator for an element, or None.

    ``frame`` is the caller's frame as the generator sees it before it yields. Generators in
    between, and ``__next__`` methods of iterators around it, are skipped.
    """
    while frame is not None:
        if not frame.f_code.co_flags & inspect.CO_GENERATOR and _instruction(frame) == _FOR_ITER:
            return id(frame)
        frame = frame.f_back
    return None


def _instruction(frame: FrameType) -> int:
    """The opcode at which ``frame`` is; -1 before its first."""
    code, at = frame.f_code.co_code, frame.f_lasti
    while at > 0 and code[at] == _CACHE:
        at -= 2
    return code[at] if at >= 0 else -1


def left_by_break(frame: FrameType | None, *, consumer: int | None) -> bool:
    """Whether a generator is being closed by ``break`` or ``return``.

    ``frame`` is the caller's frame as the generator sees it while it handles ``GeneratorExit``;
    ``consumer`` is the result of ``consumer_frame`` at the last element. Generators in between
    (``tqdm(run.steps(n))``) are themselves being closed and are skipped.
    """
    frame = _outside_generators(frame)
    if frame is None or id(frame) != consumer:
        return False
    before, at = _instructions(frame)
    return at in _DROPS and before != "END_FOR"


def was_exhausted(frame: FrameType | None) -> bool:
    """Whether an iterator around the generator (``zip``) had no more elements."""
    before, at = _instructions(frame)
    return at in _DRY or (at in _DROPS and before == "END_FOR")


def _instructions(frame: FrameType | None) -> tuple[str, str]:
    """The instruction at which ``frame`` is, and the one before; generators are skipped."""
    frame = _outside_generators(frame)
    if frame is None or frame.f_lasti < 0:
        return "", ""
    before = ""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return before, instruction.opname
        if instruction.opname not in {"CACHE", "NOP"}:
            before = instruction.opname
    return "", ""


def _outside_generators(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
    return frame
