"""Several stores as one backend, as small as can be: puts go to all and need W, reads take the
first copy that is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.checked import Check, read_alone
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format import keys


class SmallReplicated:
    """See ``Replicated``."""

    def __init__(self, stores: Sequence[Backend], write_quorum: int) -> None:
        self._stores = tuple(stores)
        self._quorum = write_quorum
        self._takers = frozenset(range(len(self._stores)))

    @property
    def url(self) -> str:
        return " + ".join(store.url for store in self._stores)

    @property
    def stores(self) -> tuple[Backend, ...]:
        return self._stores

    @property
    def write_quorum(self) -> int:
        return self._quorum

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        self._takers = full | silent

    def await_caught_up(
        self, timeout_s: float, *, of: frozenset[int] | None = None, least: int | None = None
    ) -> bool:
        return False  # it keeps no account of what its stores miss

    def capabilities(self) -> Capabilities:
        once = all(store.capabilities().create_only for store in self._stores)
        return Capabilities(create_only=once, read_bytes_best=1, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        assert not create_only
        made = 0
        why = []
        for number, store in enumerate(self._stores):
            try:
                store.put(key, data)
            except UnavailableError as error:
                why.append(str(error))
            else:
                made += number in self._takers
        if made < self._quorum:
            raise UnavailableError(f"too few stores took it. key={key} made={made} why={why}")

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        errors: list[CkptError] = []
        for store in self._stores:
            try:
                data = read_alone(store, key, bytes_max=bytes_max)
            except (UnavailableError, NotFoundError, IntegrityError) as error:
                errors.append(error)
                continue
            if (why := check(memoryview(data))) is None:
                return data
            errors.append(IntegrityError(why))
        for kind in (UnavailableError, IntegrityError, NotFoundError):
            for found in errors:
                if isinstance(found, kind):
                    raise found
        raise NotFoundError(key)

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        raise AssertionError("the log reads whole objects")

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        raise AssertionError("what is read is checked")

    def stat(self, key: str) -> Stat | None:
        raise AssertionError("the log asks each store")

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        assert prefix == keys.FOLDS, "the log asks each store"
        found: dict[str, Stat] = {}
        for store in self._stores:
            with contextlib.suppress(UnavailableError):
                found |= {stat.key: stat for stat in store.list(prefix, after=after)}
        yield from sorted(found.values(), key=lambda stat: stat.key)

    def delete(self, key: str) -> None:
        assert keys.parse_fold_key(key) is not None, "the log deletes nothing but folds"
        for store in self._stores:
            store.delete(key)

    def close(self) -> None:
        for store in self._stores:
            store.close()
