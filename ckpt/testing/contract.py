"""The contract of every store, as tests that an implementer inherits.

    class TestMyBackend(BackendContract):
        def opener(self, folder: Path) -> Callable[[], Backend]:
            return functools.partial(MyBackend, str(folder))

runs the whole contract against ``MyBackend`` under pytest. Each call of the opener opens the same
store again, as another writer would. ``BackendRaceContract`` adds races between processes, for
which the opener must be picklable.
"""

from __future__ import annotations

import mmap
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ckpt.backends.base import Backend
from ckpt.errors import IntegrityError, KeyExistsError, NotFoundError, UsageError

# ---- Memory for puts: on page boundaries or just behind them, random or of one byte.


def aligned_memory(size_bytes: int) -> memoryview:
    """Writable zeroed memory that starts on a page boundary."""
    return memoryview(mmap.mmap(-1, max(1, size_bytes)))[:size_bytes]


def buffer(size_bytes: int, *, aligned: bool, seed: int = 0, fill: int | None = None) -> memoryview:
    """A buffer of random bytes from ``seed``, or of the byte ``fill``.

    It starts on a page boundary, or one byte behind one.
    """
    memory = aligned_memory(size_bytes + 1)
    out = memory[:size_bytes] if aligned else memory[1:]
    out[:] = (
        random.Random(seed).randbytes(size_bytes) if fill is None else bytes([fill]) * size_bytes
    )
    return out


# ---- Processes that create the same keys at the same moment.

_ANSWER_S = 120.0


def race_processes(
    opener: Callable[[], Backend], names: Sequence[str], *, racers: int
) -> list[set[str]]:
    """Let ``racers`` fresh processes create each of ``names``; returns the names that each won.

    The processes meet before each name, so that their puts overlap. ``opener`` must be picklable.
    Process ``n`` writes ``process n``. Raises TimeoutError if one does not answer within two
    minutes.
    """
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(racers)
    pipes = [context.Pipe(duplex=False) for _ in range(racers)]
    processes = [
        context.Process(
            target=_race, args=(opener, tuple(names), me, gate.wait, pipes[me][1]), daemon=True
        )
        for me in range(racers)
    ]
    for process in processes:
        process.start()
    try:
        return [_answer(pipe) for pipe, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
        for ends in pipes:
            for end in ends:
                end.close()


def _answer(pipe: Connection) -> set[str]:
    if not pipe.poll(_ANSWER_S):
        raise TimeoutError(f"a racing process did not answer. waited_s={_ANSWER_S}")
    won: set[str] = pipe.recv()
    return won


def _race(
    opener: Callable[[], Backend],
    names: Sequence[str],
    me: int,
    meet: Callable[[float], int],
    answer: Connection,
) -> None:
    store = opener()
    won = set()
    for name in names:
        meet(_ANSWER_S)
        try:
            store.put(name, [f"process {me}".encode()], create_only=True)
            won.add(name)
        except KeyExistsError:
            pass
    answer.send(won)
    store.close()


Opener = Callable[[], Backend]

HOSTILE_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../a",
    "./a",
    "a/.",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x7f",
    "\ud800",
    "x" * 256,
    "/".join(["y" * 60] * 9),
    ".tmp/a",
    ".probe/a",
)
"""Names that no store may accept as a key."""

ODD_KEYS = (
    "a",
    "a b",
    "a+b%20c",
    "a#b?c&d=e",
    "[a]*{b}",
    "~",
    "~a/b",
    "-rf",
    "ключ/キー",
    "e\u0301",
    "\u00e9",
    "\U0001f600",
    "a:b",
    "a;b@c",
    "'\"<>|",
    ".hidden/.dot",
    "..two/..dots",
    "tmp/.tmp",
    "C:/x",
    "w" * 255,
    "a=b/c=d",
    "x.json.gz",
)
"""Names that every store must accept unchanged."""

_RACERS = 8
_ROUNDS = 10
_DEADLINE_S = 30.0


class BackendContract:
    """The contract of one store; subclasses define how to open it."""

    def opener(self, folder: Path) -> Opener:
        """A function that opens one fresh store, again with each call.

        ``folder`` belongs to this test alone and is empty.
        """
        raise NotImplementedError

    @pytest.fixture
    def opens(self, tmp_path: Path) -> Iterator[Opener]:
        """The opener; everything that it opened is closed after the test."""
        opened: list[Backend] = []
        opener = self.opener(tmp_path)

        def open_store() -> Backend:
            opened.append(opener())
            return opened[-1]

        yield open_store
        for store in opened:
            store.close()

    @pytest.fixture
    def store(self, opens: Opener) -> Backend:
        """One open, empty store."""
        return opens()

    def test_put_then_read_gives_the_same_bytes(self, store: Backend) -> None:
        store.put("packs/a", [b"one", bytearray(b"two"), memoryview(b"three")])
        assert read(store, "packs/a") == b"onetwothree"

    def test_other_opening_sees_what_was_put_after_it_listed(self, opens: Opener) -> None:
        writer, reader = opens(), opens()
        assert keys(reader) == []
        assert reader.stat("log/1") is None
        writer.put("log/1", [b"x"])
        assert keys(reader) == ["log/1"]
        assert read(reader, "log/1") == b"x"
        writer.put("log/2", [b"y"])
        assert keys(reader, "log/") == ["log/1", "log/2"]
        writer.delete("log/1")
        assert keys(reader) == ["log/2"]

    def test_missing_key_is_not_found_everywhere(self, store: Backend) -> None:
        for _ in ("in an empty store", "beside another object"):
            assert store.stat("packs/none") is None
            store.delete("packs/none")
            with pytest.raises(NotFoundError):
                store.read_into("packs/none", memoryview(bytearray(1)))
            with pytest.raises(NotFoundError):
                store.read_into("packs/none", memoryview(b""))
            store.put("packs/some", [b"x"])

    def test_folder_of_objects_is_no_object(self, store: Backend) -> None:
        store.put("packs/deep/a", [b"x"])
        assert store.stat("packs") is None
        assert store.stat("packs/deep") is None
        with pytest.raises(NotFoundError):
            store.read_into("packs/deep", memoryview(bytearray(1)))
        store.delete("packs/deep")
        assert keys(store) == ["packs/deep/a"]

    def test_zero_length_object_exists(self, store: Backend) -> None:
        for key, data in (("a", []), ("b", [b""]), ("c", [b"", b""])):
            store.put(key, data)
            stat = store.stat(key)
            assert stat is not None
            assert stat.size_bytes == 0
            assert read(store, key) == b""
            with pytest.raises(IntegrityError):
                store.read_into(key, memoryview(bytearray(1)))
        assert keys(store) == ["a", "b", "c"]

    def test_put_replaces_whole_object(self, store: Backend) -> None:
        store.put("a", [b"a long first version"])
        store.put("a", [b"short"])
        assert read(store, "a") == b"short"
        assert keys(store) == ["a"]

    def test_buffers_may_be_reused_when_put_returns(self, store: Backend) -> None:
        for size in (10, 3 << 20):
            memory = aligned_memory(size)
            memory[:] = b"1" * size
            store.put("a", [memory])
            memory[:] = b"2" * size
            assert read(store, "a") == b"1" * size

    def test_large_object_of_odd_buffers_is_whole(self, store: Backend) -> None:
        rng = random.Random(7)
        for seed, sizes in enumerate(
            (
                [5 << 20],
                [4096, 1, 4095, 1 << 20, 0, 3, 2 << 20],
                [1 << 20] * 4 + [17],
                [100] * 600 + [1 << 20],
                [33 << 20, 5],
            )
        ):
            data = [
                buffer(size, aligned=rng.random() < 0.6, seed=seed * 1000 + i)
                for i, size in enumerate(sizes)
            ]
            store.put("packs/large", data)
            whole = b"".join(data)
            assert read(store, "packs/large") == whole
            for _ in range(4):
                start = rng.randrange(len(whole))
                stop = rng.randrange(start, len(whole) + 1)
                assert read(store, "packs/large", start, stop) == whole[start:stop]

    def test_range_reads_give_just_that_range(self, store: Backend) -> None:
        store.put("a", [bytes(range(200))])
        for start, stop in ((0, 0), (0, 1), (0, 200), (199, 200), (200, 200), (50, 150)):
            assert read(store, "a", start, stop) == bytes(range(start, stop))

    def test_read_beyond_end_is_integrity_error(self, store: Backend) -> None:
        store.put("a", [b"12345"])
        for start, size in ((0, 6), (4, 2), (5, 1), (6, 1), (1 << 40, 1)):
            with pytest.raises(IntegrityError):
                store.read_into("a", memoryview(bytearray(size)), offset_bytes=start)
        with pytest.raises(UsageError):
            store.read_into("a", memoryview(bytearray(1)), offset_bytes=-1)

    def test_stat_tells_length_and_a_plausible_time(self, store: Backend) -> None:
        store.put("a", [b"12345"])
        stat = store.stat("a")
        assert stat is not None
        assert (stat.key, stat.size_bytes) == ("a", 5)
        assert abs(stat.modified_unix_s - time.time()) < 600
        assert [(entry.key, entry.size_bytes) for entry in store.list("")] == [("a", 5)]

    def test_list_is_in_code_point_order_from_prefix_and_after(self, store: Backend) -> None:
        names = [
            "a",
            "a-b",
            "a.b",
            "b/a",
            "b/a.x/1",
            "b/a0",
            "b/aa/1",
            "b/z",
            "b-c/x",
            "b.c/x",
            "b0/x",
            "é/x",
            "\uffee",
            "\U0001f600",
        ]
        for name in random.Random(1).sample(names, len(names)):
            store.put(name, [b"x"])
        ordered = sorted(names)
        assert keys(store) == ordered
        for prefix in ("", "a", "b", "b/", "b/a", "b/a.x/", "c", "b/aa/1", "é", "zzz/zzz"):
            for after in ("", "a", "a.b", "b", "b/", "b/a.x/", "b/a0", "b/zz", "\U0010ffff"):
                expected = [name for name in ordered if name.startswith(prefix) and name > after]
                assert keys(store, prefix, after) == expected, (prefix, after)

    def test_list_of_many_objects_is_complete(self, store: Backend) -> None:
        names = [f"log/{i:020d}.json" for i in range(60)]
        for name in names:
            store.put(name, [b"x"])
        assert keys(store, "log/", names[40]) == names[41:]

    def test_object_deleted_during_list_does_not_break_it(self, store: Backend) -> None:
        for i in range(10):
            store.put(f"d{i}/x", [b"x"])
        listed = []
        for entry in store.list(""):
            listed.append(entry.key)
            for i in range(10):
                store.delete(f"d{i}/x")
        assert listed[0] == "d0/x"
        assert listed == sorted(listed)

    def test_odd_keys_are_kept_as_they_are(self, store: Backend) -> None:
        for key in ODD_KEYS:
            store.put(f"odd/{key}", [key.encode()])
        assert keys(store) == sorted(f"odd/{key}" for key in ODD_KEYS)
        for key in ODD_KEYS:
            assert read(store, f"odd/{key}") == key.encode()
        for key in ODD_KEYS:
            store.delete(f"odd/{key}")
        assert keys(store) == []

    def test_hostile_keys_are_refused(self, store: Backend) -> None:
        acts: dict[str, Callable[[str], object]] = {
            "put": lambda key: store.put(key, [b"x"]),
            "read_into": lambda key: store.read_into(key, memoryview(bytearray(1))),
            "stat": store.stat,
            "delete": store.delete,
        }
        for key in HOSTILE_KEYS:
            for name, act in acts.items():
                try:
                    act(key)
                except UsageError:
                    continue
                pytest.fail(f"{name} accepted the key {key!a}")
        assert keys(store) == []

    def test_delete_repeats_harmlessly(self, store: Backend) -> None:
        store.put("a/b", [b"x"])
        store.put("a/c", [b"x"])
        for _ in range(2):
            store.delete("a/b")
            assert store.stat("a/b") is None
            assert keys(store) == ["a/c"]
        store.put("a/b", [b"y"])
        assert read(store, "a/b") == b"y"

    def test_create_only_refuses_taken_key_and_keeps_its_bytes(self, opens: Opener) -> None:
        store = opens()
        needs_create(store)
        store.put("log/1", [b"first"], create_only=True)
        for other in (store, opens()):
            for data in (b"other", b"first"):
                with pytest.raises(KeyExistsError):
                    other.put("log/1", [data], create_only=True)
        assert read(store, "log/1") == b"first"
        assert keys(store) == ["log/1"]
        store.delete("log/1")
        store.put("log/1", [b"again"], create_only=True)
        assert read(store, "log/1") == b"again"

    def test_create_only_takes_a_large_object(self, store: Backend) -> None:
        needs_create(store)
        data = buffer(3 << 20, aligned=True, seed=1)
        store.put("a", [data, b"tail"], create_only=True)
        assert read(store, "a") == bytes(data) + b"tail"
        with pytest.raises(KeyExistsError):
            store.put("a", [data], create_only=True)

    def test_create_only_without_the_capability_is_refused(self, store: Backend) -> None:
        if store.capabilities().create_only:
            pytest.skip("this store creates once")
        with pytest.raises(UsageError):
            store.put("a", [b"x"], create_only=True)
        assert keys(store) == []

    def test_create_only_has_one_winner_among_threads(self, opens: Opener) -> None:
        stores = [opens() for _ in range(_RACERS)]
        needs_create(stores[0])
        gate = threading.Barrier(_RACERS)

        def race(me: int) -> list[bool]:
            won = []
            for turn in range(_ROUNDS):
                gate.wait(_DEADLINE_S)
                won.append(create(stores[me], f"log/{turn}", f"writer {me}".encode() * 50))
            return won

        with ThreadPoolExecutor(_RACERS) as pool:
            results = list(pool.map(race, range(_RACERS)))
        for turn in range(_ROUNDS):
            winners = [me for me in range(_RACERS) if results[me][turn]]
            assert len(winners) == 1
            assert read(stores[0], f"log/{turn}") == f"writer {winners[0]}".encode() * 50

    def test_reader_never_sees_half_an_object(self, opens: Opener) -> None:
        writer, reader = opens(), opens()
        size, versions = 2 << 20, 12
        bodies = [buffer(size, aligned=i % 2 == 0, fill=i) for i in range(versions)]

        def write() -> None:
            for i, body in enumerate(bodies):
                writer.put("packs/one", [body])
                writer.put(f"packs/new-{i}", [body])

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            while not writing.done():
                for entry in reader.list("packs/"):
                    assert entry.size_bytes == size
                    body = read(reader, entry.key)
                    assert body == body[:1] * size
            writing.result()
        assert read(reader, "packs/one") == bytes(bodies[-1])

    def test_store_serves_many_threads_at_once(self, store: Backend) -> None:
        def work(me: int) -> None:
            for turn in range(5):
                body = bytes([me, turn]) * 1000
                store.put(f"t/{me}/{turn}", [body])
                assert read(store, f"t/{me}/{turn}", 500, 1500) == body[500:1500]
                assert keys(store, f"t/{me}/") == [f"t/{me}/{i}" for i in range(turn + 1)]
            store.delete(f"t/{me}/0")

        with ThreadPoolExecutor(_RACERS) as pool:
            list(pool.map(work, range(_RACERS)))
        assert keys(store) == sorted(
            f"t/{me}/{turn}" for me in range(_RACERS) for turn in range(1, 5)
        )

    def test_close_repeats_harmlessly_and_keeps_the_objects(self, opens: Opener) -> None:
        store = opens()
        store.put("a", [b"x"])
        store.close()
        store.close()
        assert read(opens(), "a") == b"x"

    def test_capabilities_are_sane_and_leave_nothing_behind(self, store: Backend) -> None:
        for _ in range(2):
            can = store.capabilities()
            assert can.read_bytes_best > 0
            assert can.concurrency_best > 0
            assert keys(store) == []
        assert store.url


class BackendRaceContract(BackendContract):
    """The contract with races between processes.

    Each test starts fresh interpreters, which takes seconds.
    """

    def test_create_only_has_one_winner_among_processes(self, tmp_path: Path) -> None:
        opener = self.opener(tmp_path)
        store = opener()
        needs_create(store)
        names = [f"log/{turn}" for turn in range(_ROUNDS)]
        results = race_processes(opener, names, racers=4)
        for name in names:
            winners = [me for me, won in enumerate(results) if name in won]
            assert len(winners) == 1
            assert read(store, name) == f"process {winners[0]}".encode()
        store.close()


def read(store: Backend, key: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes ``start`` to ``stop`` of an object, by default all of it."""
    if stop is None:
        stat = store.stat(key)
        assert stat is not None, f"no object at {key}"
        stop = stat.size_bytes
    out = bytearray(stop - start)
    store.read_into(key, memoryview(out), offset_bytes=start)
    return bytes(out)


def keys(store: Backend, prefix: str = "", after: str = "") -> list[str]:
    """The keys of a listing, in its order."""
    return [entry.key for entry in store.list(prefix, after=after)]


def create(store: Backend, key: str, body: bytes) -> bool:
    """Create an object; False if the key was taken."""
    try:
        store.put(key, [body], create_only=True)
    except KeyExistsError:
        return False
    return True


def needs_create(store: Backend) -> None:
    """Skip the running test if the store says that it cannot create a key only once."""
    if not store.capabilities().create_only:
        pytest.skip("this store says that it cannot create a key only once")
