"""A loop that stands still is noticed, one that waits for nothing to happen is not."""

from __future__ import annotations

from ckpt.events import Event
from ckpt.keeper.process import STALL_S, StallDetector


def test_time_beyond_what_the_loop_was_to_wait_is_told_with_what_it_computed_of_it() -> None:
    told: list[Event] = []
    now_s, computed_s = 100.0, 7.0
    stalls = StallDetector(told.append, lambda: now_s, lambda: computed_s)
    stalls.before_wait(1.0)
    now_s += 1.0 + STALL_S
    stalls.before_wait(-0.1)  # what was due is overdue: no wait at all
    assert told == []
    now_s += STALL_S + 0.25
    computed_s += 0.5
    stalls.before_wait(1.0)
    (event,) = told
    assert (event.kind, event.facts) == ("stalled", {"seconds": 0.75, "computed_s": 0.5})
    now_s += 0.5  # woken before its time
    stalls.before_wait(1.0)
    assert told == [event]
