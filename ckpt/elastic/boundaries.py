"""Snapshots that only memory holds: at which boundaries, told once for the job by rank 0 through
the board.

At the end of each boundary rank 0 publishes its word on the next one. A rank that comes to that
boundary has left the one before, and in any training whose ranks depend on each other no rank
completes a step that rank 0 has not begun; so the word is there in time and nobody waits. A rank
that finds none (its ranks run apart) takes none: its slots still hold an older complete pair.

With several nodes the word travels through keepers, so it is given one boundary earlier; and what
other nodes hold is known a moment late, so the next snapshot waits until the last one is known to
be complete.
"""

from __future__ import annotations

import dis
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ckpt.ipc.board import Board, TrainerPhase

# When this trainer reached the points of its start, for the account of a recovery.


class Milestones:
    """Notes points; hands each on once somebody listens. Names are those of ``messages.Phase``."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, float]] = []
        self._names: set[str] = set()

    def reach(self, name: str) -> None:
        """This point is reached now; only the first time counts."""
        if name not in self._names:
            self._names.add(name)
            self._noted.append((name, time.monotonic()))

    def report_to(self, tell: Callable[[str, float], None]) -> None:
        """Tell what was noted since the last call."""
        noted, self._noted = self._noted, []
        for name, at_s in noted:
            tell(name, at_s)


STAGE = 1
"""The flag of a decision: stage this boundary."""


DECIDED_AHEAD = 2
"""For which boundary rank 0 gives its word to other nodes: the one after the next."""

INCOMPLETE_AFTER_S = 2.0
"""A snapshot that is not complete on all nodes by then never will be: a rank had no slot for it."""


class MemoryTier:
    """One rank's view of the board. ``every``: boundaries from one staged snapshot to the next; 0
    for none.

    ``rank`` is this node's; ``leads``: it is rank 0 of the job. ``pass_on`` brings its words to
    other nodes (None: there are none): a boundary, and what all ranks do there.
    """

    def __init__(
        self,
        board: Board,
        *,
        rank: int,
        every: int,
        leads: bool | None = None,
        forward_decision: Callable[[int, int], object] | None = None,
    ) -> None:
        self._board = board
        self._mine = board.rank(rank)
        self._leads = rank == 0 if leads is None else leads
        self._pass_on = forward_decision
        self._every = every
        self._staged_at: int | None = None
        self._at = 0
        self._told = 0
        self._told_stage = 0
        self._told_stage_s = 0.0

    def begin(self, completed: int) -> None:
        """Training starts: ``completed`` steps are done."""
        self._staged_at = self._at = self._told = self._told_stage = completed
        self._mine.attempt = self._board.attempt
        self._mine.phase = TrainerPhase.TRAINING
        self._mine.beat(completed)
        self._announce(completed)

    def should_stage(self, completed: int, *, since: int) -> bool:
        """Whether all ranks stage this boundary; ``since`` is the one before it."""
        return self._every > 0 and self._board.decision(since + 1) == STAGE and completed > since

    def complete_boundary(self, completed: int, *, staged: bool) -> None:
        """This boundary is done with; on rank 0, say what happens at the next one."""
        if staged:
            self._staged_at = completed
            self._mine.staged += 1
        self._mine.beat(completed)
        self._mine.first_step_done = True
        self._announce(completed)
        self._at = completed

    def count_skipped(self) -> None:
        """A boundary that was to be staged found no slot."""
        self._mine.skipped += 1

    def set_phase(self, phase: TrainerPhase) -> None:
        """Steps stand still for a reason, or go on (``Phase.TRAINING``)."""
        self._mine.phase = phase
        self._mine.beat(self._mine.completed or 0)

    def _announce(self, completed: int) -> None:
        if not self._leads or not self._every:
            return
        assert self._staged_at is not None, "begun"
        if self._pass_on is not None:
            self._announce_to_all(completed, self._pass_on)
            return
        due = completed + 1 - self._staged_at >= self._every
        self._board.decide(completed + 1, STAGE if due and self._slowest() >= self._at else 0)

    def _announce_to_all(self, completed: int, pass_on: Callable[[int, int], object]) -> None:
        for boundary in range(max(self._told, completed) + 1, completed + DECIDED_AHEAD + 1):
            due = boundary - self._told_stage >= self._every and self._last_is_settled()
            flags = STAGE if due else 0
            self._board.decide(boundary, flags)
            pass_on(boundary, flags)
            self._told = boundary
            if due:
                self._told_stage, self._told_stage_s = boundary, time.monotonic()

    def _last_is_settled(self) -> bool:
        """Whether the last snapshot is complete on all nodes, or never will be."""
        if not self._told_stage_s or time.monotonic() - self._told_stage_s > INCOMPLETE_AFTER_S:
            return True
        # How far all are is read before what they hold: who is past that boundary without the
        # snapshot did not take it, for instance because the word came late.
        done = [one.completed for one in self._board.all_ranks()]
        complete = self._board.newest_complete()
        if complete is not None and complete.step >= self._told_stage:
            return True
        return all(one is not None and one > self._told_stage for one in done)

    def _slowest(self) -> int:
        """Where the slowest rank is. One that is behind this one's last boundary would have the
        others fill all their slots."""
        done = [one.completed for one in self._board.all_ranks()]
        return min(self._at if one is None else one for one in done)


# Whether an optimizer stepped since the last snapshot point.
#
# Inside a gradient accumulation the gradients are state too, and nobody stores gradients: a
# snapshot there would restore another training. So a boundary counts as a snapshot point only
# where a tracked optimizer has stepped.


class StepWatch:
    """Counts steps of tracked optimizers by their post-step hooks."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._watched: set[int] = set()
        self._stepped = False
        self.was_snapshot_point = True
        """Whether the last boundary was a snapshot point."""

    def add(self, items: Mapping[str, object]) -> None:
        """Watch every optimizer among ``items``, nested ones too."""
        for optimizer in _optimizers(items):
            if id(optimizer) not in self._watched:
                self._watched.add(id(optimizer))
                self._handles.append(optimizer.register_step_post_hook(self._on_step))

    def at_snapshot_point(self) -> bool:
        """Ask once a boundary: whether it is a snapshot point. With no optimizer watched, each one
        is."""
        self.was_snapshot_point = self._stepped or not self._watched
        self._stepped = False
        return self.was_snapshot_point

    @property
    def stepped(self) -> bool:
        """Whether an optimizer stepped since the last boundary."""
        return self._stepped

    def close(self) -> None:
        """Take the hooks off again."""
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


# How a loop over a generator was left: by ``break`` or ``return``, or by an exception.
#
# ``break`` completes the body that it stands in; an exception does not. Python tells a generator
# neither: in both cases it just closes it. But at that moment the frame that drops the generator
# stands at the instruction that drops it: popping the iterator off the stack for ``break`` and
# ``return``, whatever raised for an exception, ``FOR_ITER`` or ``END_FOR`` where an enclosing
# iterator (``zip``) ran dry. A frame that only holds the last reference (a variable, the
# traceback of a caught exception) may stand anywhere, so only the frame whose ``for`` asks the
# generator counts: ``consumer_frame`` finds it at each step. In doubt the answer is "not by break":
# that costs one step done again, never a wrong state.

_DROPS = frozenset({"POP_TOP", "POP_ITER"})
_CACHE = 0
_FOR_ITER = dis.opmap["FOR_ITER"]
_DRY = frozenset({"FOR_ITER", "END_FOR"})


def consumer_frame(frame: FrameType | None) -> int | None:
    """The identity of the frame whose ``for`` asks a generator for its next element; None where
    there is no such frame.

    ``frame`` is the caller's frame as the generator sees it before it yields. Generators in between
    and ``__next__`` methods of iterators around it are passed over.
    """
    while frame is not None:
        if not frame.f_code.co_flags & inspect.CO_GENERATOR and frame.f_lasti >= 0:
            code, at = frame.f_code.co_code, frame.f_lasti
            while at > 0 and code[at] == _CACHE:
                at -= 2
            if code[at] == _FOR_ITER:
                return id(frame)
        frame = frame.f_back
    return None


def left_by_break(frame: FrameType | None, *, consumer: int | None) -> bool:
    """Whether the frame that closes a generator does so for ``break`` or ``return``.

    ``frame`` is the caller's frame as the generator sees it while it handles ``GeneratorExit``,
    ``asking`` what ``consumer_frame`` found at its last element. Generators in between
    (``tqdm(run.steps(n))``) are being closed themselves and are passed over.
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
    """The instruction before the one at which ``frame`` (or the first below it that is no
    generator) stands, and that one."""
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
