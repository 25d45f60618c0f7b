"""How a loop over a generator was left: by ``break`` or ``return``, or by an exception.

``break`` completes the body that it stands in; an exception does not. Python tells a generator neither: in both cases it just
closes it. But at that moment the frame that drops the generator stands at the instruction that drops it: popping the iterator
off the stack for ``break`` and ``return``, whatever raised for an exception, ``FOR_ITER`` or ``END_FOR`` where an enclosing
iterator (``zip``) ran dry. A frame that only holds the last reference (a variable, the traceback of a caught exception) may
stand anywhere, so only the frame whose ``for`` asks the generator counts: ``asking_frame`` finds it at each step. In doubt the
answer is "not by break": that costs one step done again, never a wrong state.
"""

from __future__ import annotations

import dis
import inspect
from types import FrameType

_DROPS = frozenset({"POP_TOP", "POP_ITER"})
_CACHE = 0
_FOR_ITER = dis.opmap["FOR_ITER"]
_DRY = frozenset({"FOR_ITER", "END_FOR"})


def asking_frame(frame: FrameType | None) -> int | None:
    """The identity of the frame whose ``for`` asks a generator for its next element; None where there is no such frame.

    ``frame`` is the caller's frame as the generator sees it before it yields. Generators in between and ``__next__`` methods
    of iterators around it are passed over.
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


def left_by_break(frame: FrameType | None, *, asking: int | None) -> bool:
    """Whether the frame that closes a generator does so for ``break`` or ``return``.

    ``frame`` is the caller's frame as the generator sees it while it handles ``GeneratorExit``, ``asking`` what
    ``asking_frame`` found at its last element. Generators in between (``tqdm(run.steps(n))``) are being closed themselves and
    are passed over.
    """
    frame = _outside_generators(frame)
    if frame is None or id(frame) != asking:
        return False
    before, at = _instructions(frame)
    return at in _DROPS and before != "END_FOR"


def ran_dry(frame: FrameType | None) -> bool:
    """Whether an iterator around the generator (``zip``) had no more elements."""
    before, at = _instructions(frame)
    return at in _DRY or (at in _DROPS and before == "END_FOR")


def _instructions(frame: FrameType | None) -> tuple[str, str]:
    """The instruction before the one at which ``frame`` (or the first below it that is no generator) stands, and that one."""
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
