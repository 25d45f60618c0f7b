"""Examining stores before they are trusted, or when something is wrong: what each does, and what they do together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
from ckpt.errors import CkptError
from ckpt.maintenance.doctor.doctor_facts import StoreFindings
from ckpt.maintenance.doctor.probe import LARGE_BYTES, Probing


@dataclass(frozen=True, slots=True)
class Patient:
    """A store to be examined, and how to open it once more (None: a second client is not tried)."""

    store: Backend
    again: Callable[[], Backend] | None = None


def examine(patients: Sequence[Patient], *, large_bytes: int = LARGE_BYTES) -> list[StoreFindings]:
    """Use each store with short-lived objects below ``probe/``, one after the other so that they don't share the link.

    Cost: some hundred small operations and one object of ``large_bytes`` each way a store. What could not be removed afterwards
    is named. Raises nothing of the stores; see ``judge`` for what the findings mean.
    """
    probings = [Probing(patient.store, patient.again) for patient in patients]
    findings: list[StoreFindings] = []
    try:
        findings = [probing.run(large_bytes=large_bytes) for probing in probings]
        same = _same_places(probings, findings)
    finally:
        left = [probing.close() for probing in probings]
    return [
        replace(found, same_as=tuple(sorted(same[number])), leftovers=left[number])
        for number, found in enumerate(findings)
    ]


def _same_places(probings: Sequence[Probing], findings: Sequence[StoreFindings]) -> list[set[int]]:
    """Which stores see what was put into which: two addresses may lead to one place."""
    same: list[set[int]] = [set() for _ in probings]
    for number, probing in enumerate(probings):
        if len(probings) < 2 or not findings[number].reached or "put" in findings[number].failures:
            continue
        key = probing.mark()
        for other, beside in enumerate(probings):
            if key is None or other == number or not findings[other].reached:
                continue
            if _sees(beside.store, key):
                same[number].add(other)
                same[other].add(number)
    return same


def _sees(store: Backend, key: str) -> bool:
    try:
        return store.stat(key) is not None
    except CkptError:
        return False
