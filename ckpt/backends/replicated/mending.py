"""One object brought to one store: look at all copies, decide, copy."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ckpt.backends.replicated.buffers import PooledBuffer
from ckpt.backends.replicated.group import Group
from ckpt.backends.replicated.ledger import Copy, Later, Leave, Well, agree_outside, plan_mend, unproven
from ckpt.backends.replicated.mailbox import Mailbox
from ckpt.backends.replicated.member import Member
from ckpt.backends.replicated.pace import stall_s
from ckpt.backends.replicated.replicate_ledger import Need, Proof, Why
from ckpt.errors import CkptError
from ckpt.format.digest import digest

PIECE_BYTES = 16 << 20
"""Bytes asked for at once when a whole object is read: a request that any store serves well."""


@dataclass(frozen=True, slots=True)
class Mended:
    """The copy is as the others."""


@dataclass(frozen=True, slots=True)
class Mending:
    """One object brought to one store."""

    group: Group
    member: Member
    key: str
    need: Need

    def run(self) -> Well | Later | Leave | Mended:
        """Look at all copies, decide, copy. Raises CkptError where the store itself fails."""
        plan = self._plan()
        if not isinstance(plan, Copy):
            return plan
        all_known = plan.all_known
        for place in sorted(plan.sources, key=self.group.nearest(plan.size_bytes).index):
            source = self.group.members[place]
            region = _read_whole(self.group, source, self.member.place, self.key, plan.size_bytes)
            if region is None:
                all_known = False
                continue
            try:
                if not self._proven(region.view):
                    continue
                end = self._replace(region.view, plan)
            finally:
                self.group.memory.free(self.member.place, plan.size_bytes)
                self.group.memory.reuse(region)
            return end
        return unproven(all_known=all_known)

    def _plan(self) -> Copy | Well | Later | Leave:
        group, key = self.group, self.key
        answers = group.ask(range(len(group.members)), lambda m: m.read(0, lambda: m.store.stat(key)))
        told = {place: answer for place, answer in answers.items() if not isinstance(answer, CkptError)}
        sizes = {place: None if answer is None else answer.size_bytes for place, answer in told.items()}
        plan = plan_mend(self.need, self.member.place, sizes, group.quorum)
        if isinstance(plan, Copy):
            for place, size in sizes.items():
                if size is None and place != self.member.place:
                    group.note(place, key, Need(Why.MISSING, self.need.proof), why="not there", alarm=True)
        return plan

    def _proven(self, data: memoryview) -> bool:
        proof = self.need.proof
        return proof is None or digest(data[proof.offset_bytes : proof.end_bytes]) == proof.digest

    def _replace(self, data: memoryview, plan: Copy) -> Well | Leave | Mended:
        if plan.compare:
            end = self._compared(data)
            if end is not None:
                return end
        member = self.member
        # Deleted while it was copied: then it must not come back.
        if self.group.ledger.needs[member.place].get(self.key) is None:
            return Well()
        member.write(len(data), lambda: member.store.put(self.key, [data]))
        return Mended()

    def _compared(self, data: memoryview) -> Well | Leave | None:
        """Read the copy that was found bad, piece by piece; None where it may be replaced by ``data``."""
        member, proof = self.member, self.need.proof
        stat = member.read(0, lambda: member.store.stat(self.key))
        mine_bytes = 0 if stat is None else min(stat.size_bytes, len(data))
        piece = memoryview(bytearray(min(PIECE_BYTES, mine_bytes)))
        for at in range(0, mine_bytes, PIECE_BYTES):
            part = piece[: min(PIECE_BYTES, mine_bytes - at)]
            _read(member, self.key, part, at)
            if not agree_outside(part, data[at : at + len(part)], at, self.need):
                return Leave("two copies differ outside the range that is known to be right")
        if proof is not None and mine_bytes == len(data) and _matches(member, self.key, proof):
            return Well()  # it was read wrongly once, and is right where it lies
        return None


def _matches(member: Member, key: str, proof: Proof) -> bool:
    mine = memoryview(bytearray(proof.size_bytes))
    _read(member, key, mine, proof.offset_bytes)
    return digest(mine) == proof.digest


def _read(member: Member, key: str, out: memoryview, offset_bytes: int) -> None:
    member.read(len(out), lambda: member.store.read_into(key, out, offset_bytes=offset_bytes))


def _read_whole(group: Group, source: Member, target: int, key: str, size_bytes: int) -> PooledBuffer | None:
    """The whole object of one store; None where it doesn't give it. The memory is charged to ``target``, and then to be freed.

    A source that hangs is given up, and what it still holds is charged to it.
    """
    mailbox: Mailbox[tuple[PooledBuffer | None]] = Mailbox()
    until_s = time.monotonic() + stall_s(group.pace, size_bytes)
    if not group.memory.claim(target, size_bytes, until_s=until_s):
        return None
    region = group.memory.buffer(size_bytes)

    def job() -> None:
        answer: PooledBuffer | None = region
        try:
            for at in range(0, max(1, size_bytes), PIECE_BYTES):
                if mailbox.closed():
                    break
                _read(source, key, region.view[at : at + PIECE_BYTES], at)
        except CkptError:
            answer = None
        if not mailbox.put((answer,)):
            group.memory.free(source.place, size_bytes)

    if not source.reading.lane.submit(job):
        group.memory.free(target, size_bytes)
        return None
    got = mailbox.get(until_s - time.monotonic())
    if got is None:
        group.memory.charge(source.place, size_bytes)
        group.memory.free(target, size_bytes)
        late = mailbox.close()
        if late:
            group.memory.free(source.place, size_bytes)
        return None
    if got[0] is None:
        group.memory.free(target, size_bytes)
    return got[0]
