"""What all of a scrub's work shares: the stores, what was found, how fast, whom to tell, and the only ``put``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ckpt.backends.base import Backend
from ckpt.errors import UnavailableError
from ckpt.events import Event, Fact, Tell
from ckpt.maintenance.copies import Copy, Place, What
from ckpt.maintenance.copies_pace import Pace
from ckpt.maintenance.scrub.scrub_facts import Findings, Trouble
from ckpt.maintenance.scrub.scrub_roles import AWAY, EMPTY

SILENCES_MAX = 5
"""A store that does not answer for so many objects in a row is left alone for the rest of the scrub."""
ALARMS_MAX = 20
"""How many objects one scrub raises an alarm for, each by itself; its last word counts all."""


@dataclass(slots=True)
class Bench:
    """One scrub's stores and findings. Only the scrub's own thread changes it; others read through ``stores`` and ``pace``."""

    stores: tuple[Backend, ...]
    findings: Findings
    writable: set[int]
    """The stores that copies are written to; none where a scrub only looks."""
    tell: Tell
    pace: Pace = field(default_factory=Pace)
    tainted: set[int] = field(default_factory=set)
    """Stores that still lack what another has: no log record goes there, or it would name what isn't there."""
    _silences: dict[int, int] = field(default_factory=dict)
    _alarms: int = 0

    @property
    def active(self) -> list[int]:
        """The stores that are looked at: those that answer, and an empty one where it is to be filled."""
        roles = enumerate(tally.role for tally in self.findings.stores)
        return [number for number, role in roles if role != AWAY and (role != EMPTY or number in self.writable)]

    def row(self, copies: Mapping[int, Copy]) -> list[Copy]:
        """One entry for each store: one that is not looked at may have anything, or is known to have nothing."""
        unknown, nothing = Copy(What.UNREADABLE, all_bad=True), Copy(What.MISSING, all_bad=True)
        roles = [tally.role for tally in self.findings.stores]
        return [copies.get(n) or (nothing if role == EMPTY else unknown) for n, role in enumerate(roles)]

    def heard(self, copies: Mapping[int, Copy]) -> None:
        """Count each store's silence; at the limit it is away."""
        for number, copy in copies.items():
            silences = self._silences.get(number, 0) + 1 if copy.what is What.UNREADABLE else 0
            self._silences[number] = silences
            if silences >= SILENCES_MAX:
                self.lose(number, copy.message)

    def lose(self, number: int, why: str) -> None:
        """From now on the store is away."""
        tally = self.findings.stores[number]
        tally.role, tally.problem = AWAY, why
        self.writable.discard(number)
        self.tainted.add(number)

    def put(self, number: int, key: str, data: bytes | memoryview) -> bool:
        """Write a copy that was verified. False where the store refused or did not answer: its tally then says why."""
        self.pace.take(len(data))
        try:
            self.stores[number].put(key, [data])
        except UnavailableError as error:
            self.tainted.add(number)
            self.findings.stores[number].problem = str(error)
            self.heard({number: Copy(What.UNREADABLE, str(error))})
            return False
        self.findings.stores[number].mended += 1
        facts: dict[str, Fact] = {"key": key, "store": self.stores[number].url, "size_bytes": len(data)}
        self.tell(Event("scrub-mended", f"a copy was written anew: {key}", facts))
        return True

    def settle(
        self,
        key: str,
        copies: Mapping[int, Copy],
        *,
        mended: Collection[int] = (),
        lost: bool = False,
        nowhere: Collection[Place] = (),
    ) -> None:
        """Count one object: its copies as they were found, who has a right one by now, and whether nobody has one.

        ``nowhere``: the chunks to name for a copy of which all are bad.
        """
        wrong = {number: copy for number, copy in copies.items() if copy.what is not What.OK}
        for number, copy in copies.items():
            self.findings.stores[number].count(copy.what)
        self.findings.thin += len(copies) - len(wrong) < min(self.findings.write_quorum, len(self.stores))
        self.findings.lost += lost
        for number, copy in wrong.items():
            done = number in mended
            if not (done or lost):
                self.findings.unmended += 1
                self.tainted.add(number)
            places = nowhere if copy.all_bad else copy.bad
            offsets = () if copy.what is What.MISSING else tuple(sorted({at.offset_bytes for _, at in places}))
            self.findings.add(
                Trouble(
                    key=key, store=number, what=copy.what, message=copy.message, offsets=offsets, lost=lost, mended=done
                )
            )
        if wrong:
            self._alarm(key, wrong, lost=lost)

    def _alarm(self, key: str, wrong: Mapping[int, Copy], *, lost: bool) -> None:
        self._alarms += 1
        if self._alarms > ALARMS_MAX:
            return
        where = ", ".join(f"{self.stores[number].url}: {copy.what.value}" for number, copy in wrong.items())
        text = f"no store has {key} as it should be" if lost else f"a copy of {key} is not as it should be"
        self.tell(Event("scrub-damage", text, {"key": key, "where": where, "lost": lost}, alarm=True))
