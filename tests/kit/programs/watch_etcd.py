"""Watches all keys in etcd from the first revision on, whichever members die meanwhile; a line for
each change.

    python watch_etcd.py FILE ROOT HOST:PORT,HOST:PORT,…

Keys of the job have no ROOT; those of others, its log's for one, are whole. It says when it saw a
change, in nanoseconds of CLOCK_BOOTTIME: never before it was made. Speaks JSON over HTTP, as etcd
offers it, so that it shares no code with what it watches.
"""

from __future__ import annotations

import base64
import http.client
import json
import sys
import time
from pathlib import Path

ALL = "/ckpt/"
SILENT_S = 1.5
"""Nothing is heard for so long: ask another member."""


def main(path: Path, root: str, endpoints: list[str]) -> None:
    seen = 0
    with path.open("a", buffering=1) as file:
        while True:
            for endpoint in endpoints:
                try:
                    for line, revision in changes(endpoint, root, seen + 1):
                        file.write(line)
                        seen = max(seen, revision)
                except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                    print(f"{endpoint} {error!r}", file=sys.stderr, flush=True)
                    time.sleep(0.05)


def changes(endpoint: str, root: str, first: int):  # type: ignore[no-untyped-def]
    """Changes from a revision on, until the member says nothing any more. All of one revision come
    together."""
    connection = http.client.HTTPConnection(endpoint, timeout=SILENT_S)
    try:
        create = {
            "key": text(ALL),
            "range_end": text(ALL[:-1] + "0"),
            "start_revision": first,
            "fragment": False,
        }
        connection.request("POST", "/v3/watch", json.dumps({"create_request": create}))
        answer = connection.getresponse()
        while True:
            try:
                line = answer.readline()
            except TimeoutError:
                return  # it may be frozen, or behind: another one is asked from where we are
            if not line:
                return
            at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            for event in json.loads(line)["result"].get("events", ()):
                revision = int(event["kv"]["mod_revision"])
                yield said(event, revision, at_ns, root), revision
    finally:
        connection.close()


def said(event: dict, revision: int, at_ns: int, root: str) -> str:  # type: ignore[type-arg]
    found = event["kv"]
    change = {
        "revision": revision,
        "at": at_ns,
        "key": base64.b64decode(found["key"]).decode().removeprefix(root),
        "value": None if event.get("type") == "DELETE" else found.get("value", ""),
        "lease": int(found.get("lease", 0)),
    }
    return f"{json.dumps(change)}\n"


def text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","))
