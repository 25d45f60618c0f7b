"""How far each store of a log is known to list every place: a store that was away lacks what was written meanwhile."""

from __future__ import annotations

from ckpt.backends.base import Backend
from ckpt.format import keys


class Places:
    """What each store was seen to list, by its id. For one thread; what is known once isn't listed again."""

    def __init__(self) -> None:
        self._whole: dict[str, int] = {}

    def gap(self, store: Backend, store_id: str, *, upto_seq: int) -> int | None:
        """The first place below ``upto_seq`` at which ``store`` lists no record; None where it lists all.

        Cost: a list of the places from the first that was not seen yet. Raises UnavailableError.
        """
        whole = self._whole.get(store_id, 0)
        if whole >= upto_seq:
            return None
        seqs: set[int] = set()
        for stat in store.list(keys.LOG, after=keys.log_key(whole - 1) if whole else ""):
            seq = keys.parse_log_key(stat.key)
            seq = keys.parse_settled_key(stat.key) if seq is None else seq
            if seq is not None:
                seqs.add(seq)
        while whole in seqs:
            whole += 1
        self._whole[store_id] = whole
        return whole if whole < upto_seq else None
