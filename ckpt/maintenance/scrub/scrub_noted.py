"""What was seen of records and folds while the log was read, kept until it is known what of it was mended."""

from __future__ import annotations

from collections import Counter

from ckpt.events import Event
from ckpt.format import keys
from ckpt.maintenance.copies import What
from ckpt.maintenance.scrub.log import LogFindings
from ckpt.maintenance.scrub.report import Bench
from ckpt.maintenance.scrub.scrub_facts import TROUBLES_MAX, Trouble


class Noted:
    """Counts every copy and names those that are wrong, up to a limit. Call it with each copy as it was found."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, What]] = Counter()
        self._wrong: list[tuple[int, str, What, str]] = []

    def __call__(self, number: int, key: str, what: What, message: str) -> None:
        """One copy: the store's number, the key, what it is, and why."""
        self._counts[number, what] += 1
        if what is not What.OK and len(self._wrong) < TROUBLES_MAX:
            self._wrong.append((number, key, what, message))

    def settle(self, bench: Bench, log: LogFindings) -> None:
        """Tell it all. What ``log`` still lists as wanting is unmended."""
        left = {(number, keys.log_key(seq)) for number, faults in enumerate(log.faults) for seq in faults.first}
        left |= {(number, keys.settled_key(seq)) for number, faults in enumerate(log.faults) for seq in faults.second}
        left |= {(number, keys.fold_key(fault.seq)) for fault in log.folds for number in fault.wrong}
        findings = bench.findings
        unreadable = wrong = 0
        for (number, what), count in self._counts.items():
            findings.stores[number].count(what, count)
            unreadable += count if what is What.UNREADABLE else 0
            wrong += 0 if what is What.OK else count
        for number, key, what, message in self._wrong:
            done = what is not What.UNREADABLE and (number, key) not in left
            findings.add(Trouble(key=key, store=number, what=what, message=message, mended=done))
        findings.total += wrong - len(self._wrong)
        findings.unmended += len(left) + unreadable
        if self._wrong:
            number, key, what, _ = self._wrong[0]
            facts = {"first": key, "store": bench.stores[number].url, "what": what.value, "copies": wrong}
            bench.tell(Event("scrub-damage", "copies of log records are not as they should be", facts, alarm=True))
