"""How a loop over a generator was left: by ``break`` or ``return``, or by an exception.

``break`` completes the body that it stands in; an exception does not. Python tells a generator neither: in both cases it just
closes it. But at that moment the frame that drops the generator stands at the instruction that drops it: popping the iterator
off the stack for ``break`` and ``return``, whatever raised for an exception, ``FOR_ITER`` or ``END_FOR`` where an enclosing
iterator (``zip``) ran dry. In doubt the answer is "not by break": that costs one step done again, never a wrong state.
"""

from __future__ import annotations

import dis
import inspect
from types import FrameType

_DROPS = frozenset({"POP_TOP", "POP_ITER"})


def left_by_break(frame: FrameType | None) -> bool:
    """Whether the frame that closes a generator does so for ``break`` or ``return``.

    ``frame`` is the caller's frame as the generator sees it while it handles ``GeneratorExit``. Generators in between
    (``tqdm(run.steps(n))``) are being closed themselves and are passed over.
    """
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
    if frame is None or frame.f_lasti < 0:
        return False
    before = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.opname in _DROPS and before != "END_FOR"
        if instruction.opname not in {"CACHE", "NOP"}:
            before = instruction.opname
    return False
