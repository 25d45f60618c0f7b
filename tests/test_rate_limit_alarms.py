"""An alarm that comes again and again is told once, then once a minute with its number."""

from __future__ import annotations

from ckpt.events import Event
from ckpt.rate_limit import ALARMS_KNOWN_MAX, AlarmLimiter


class Told:
    """A limiter over a clock of the test's, and what it passed on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.texts: list[str] = []
        self.limiter = AlarmLimiter(
            lambda event: self.texts.append(event.text), repeat_s=60.0, clock=lambda: self.now_s
        )

    def alarm(self, text: str, kind: str = "save-failed") -> None:
        self.limiter(Event(kind, text, alarm=True))


def test_alarm_that_differs_in_numbers_only_is_told_once_a_minute_with_its_count() -> None:
    told = Told()
    for step in range(50):
        told.now_s = step * 2.0
        told.alarm(f"the snapshot of epoch 1 step {step} is not durable: free_bytes={step * 7}")
    assert told.texts == [
        "the snapshot of epoch 1 step 0 is not durable: free_bytes=0",
        "the snapshot of epoch 1 step 30 is not durable: free_bytes=210 (29 more of these in 60 s)",
    ]


def test_alarm_with_an_error_code_is_the_same_whatever_its_text() -> None:
    told = Told()
    for key, code in (("a1f", "store-full"), ("b2e", "store-full"), ("c", "store-denied")):
        event = Event("save-failed", f"full. key=packs/{key}", {"code": code}, alarm=True)
        told.limiter(event)
    assert told.texts == ["full. key=packs/a1f", "full. key=packs/c"]


def test_alarms_of_another_kind_or_text_and_other_events_are_passed_on() -> None:
    told = Told()
    told.alarm("step 1 is lost")
    told.alarm("step 1 is lost", kind="skipped")
    told.alarm("step 1 was lost")
    for step in range(3):
        told.limiter(Event("staged", f"step {step}"))
    assert told.texts == ["step 1 is lost"] * 2 + ["step 1 was lost", "step 0", "step 1", "step 2"]


def test_alarm_that_comes_again_after_a_quiet_time_is_told_without_a_count() -> None:
    told = Told()
    told.alarm("full")
    told.now_s = 3600.0
    told.alarm("full")
    assert told.texts == ["full", "full"]


def test_only_so_many_alarms_are_remembered() -> None:
    told = Told()
    words = ["x" * n for n in range(1, ALARMS_KNOWN_MAX + 2)]
    for word in words:
        told.alarm(word)
    told.alarm(words[0])  # forgotten
    told.alarm(words[-1])  # remembered
    assert told.texts == [*words, words[0]]
