"""HAProxy as the front of a group: its configuration, and what brings its slots up to date. Pure.

The configuration has a number of slots without an address. Each replica of the group gets one,
through HAProxy's runtime socket: those that serve are ``ready``, standbys are in ``drain``
(checked, and sent nothing), and all others are in ``maint``. A slot is known by its address alone,
so HAProxy may be restarted, and may be what remembers while who controls it is restarted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import IntegrityError, UsageError
from ckpt.serve.front.decide import IDEMPOTENT
from ckpt.serve.headers import HEALTH, IDEMPOTENCY_KEY, RETRY_AFTER

BACKEND = "replicas"
SLOTS = 64
NOWHERE = "127.0.0.1:1"
"""The address of a slot that nobody has."""
REFUSED = '{"error": "no replica can take the request now"}'
BUFFER_BYTES = 64 << 10
"""HAProxy repeats only requests that fit into one of its buffers."""

BALANCE = {"two-choices": "random(2)", "least-loaded": "leastconn", "round-robin": "roundrobin"}
"""What HAProxy calls our policies."""

SlotState = Literal["ready", "drain", "maint"]


@dataclass(frozen=True, slots=True)
class HaproxySlot:
    """One server of HAProxy's. ``up``: by its own checks."""

    name: str
    address: str
    state: SlotState
    up: bool


def render_config(
    *,
    bind: str,
    socket: str,
    policy: str,
    queue: int,
    deadline_s: float,
    repeatable: Collection[str],
) -> str:
    """HAProxy's configuration. ``bind``: ``host:port``; ``socket``: the path of its runtime socket.

    ``repeatable``: paths whose requests may be sent again when an answer was lost. Raises
    UsageError for a policy that HAProxy lacks, and for a path that would end a line.
    """
    balance = BALANCE.get(policy)
    if balance is None:
        raise UsageError(f"HAProxy has no such policy. policy={policy} policies={sorted(BALANCE)}")
    if broken := [path for path in (*repeatable, socket) if not path.isprintable() or " " in path]:
        raise UsageError(f"a path has a blank or a control character. paths={broken}")
    milliseconds = max(1, round(deadline_s * 1e3))
    declared = f"    acl declared path {' '.join(sorted(repeatable))}\n" if repeatable else ""
    may = "idempotent or keyed or declared" if repeatable else "idempotent or keyed"
    return f"""\
global
    stats socket {socket} mode 600 level admin
    maxconn {queue}
    tune.bufsize {BUFFER_BYTES}

defaults
    mode http
    timeout connect 1s
    timeout check 1s
    timeout client 75s
    timeout http-keep-alive 75s
    timeout queue {milliseconds}ms
    timeout server {milliseconds}ms
    option redispatch 1
    option http-buffer-request
    option forwardfor
    retries 3
    retry-on conn-failure empty-response response-timeout 503
    http-error status 503 content-type application/json string '{REFUSED}' hdr {RETRY_AFTER} 1

frontend group
    bind {bind}
    acl idempotent method {" ".join(sorted(IDEMPOTENT))}
    acl keyed req.hdr({IDEMPOTENCY_KEY}) -m found
{declared}    http-request disable-l7-retry unless {may}
    default_backend {BACKEND}

backend {BACKEND}
    balance {balance}
    option httpchk
    http-check send meth GET uri {HEALTH}
    # 503 is said by one that leaves or warms up, and it answers: what it has begun is not cut off.
    http-check expect status 200,503
    default-server check inter 500ms fall 1 rise 1 init-addr none
    server-template r 1-{SLOTS} {NOWHERE} disabled
"""


_MAINT = 0x01 | 0x02 | 0x20 | 0x40
"""Of HAProxy's administrative state: forced, inherited, unresolved. That the configuration disabled
a server (0x04) is remembered there for ever, and says nothing about now."""
_DRAIN = 0x08 | 0x10


def parse_slots(text: str) -> list[HaproxySlot]:
    """The slots in HAProxy's answer to ``show servers state``. Raises IntegrityError."""
    lines = text.strip().splitlines()
    head = next((line for line in lines if line.startswith("# ")), "")
    columns = head.removeprefix("# ").split()
    slots = []
    for line in lines:
        values = dict(zip(columns, line.split(), strict=False))
        if line.startswith("#") or values.get("be_name") != BACKEND:
            continue
        try:
            admin = int(values["srv_admin_state"])
            state: SlotState = "maint" if admin & _MAINT else "drain" if admin & _DRAIN else "ready"
            address = f"{values['srv_addr']}:{int(values['srv_port'])}"
            up = int(values["srv_op_state"]) != 0
            slots.append(HaproxySlot(values["srv_name"], address, state, up))
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"not HAProxy's answer about a server. line={line!r}") from error
    if not slots:
        raise IntegrityError(
            f"HAProxy has no servers of the backend {BACKEND}; start it with the configuration "
            f"that `ckpt serve haproxy --config` prints. answer={text[:200]!r}"
        )
    return slots


def slot_commands(
    slots: Sequence[HaproxySlot], replicas: Mapping[str, str], serving: Collection[str]
) -> tuple[list[str], list[str]]:
    """The commands that bring HAProxy's slots up to date, and the replicas that have no slot.

    ``replicas``: the address of each by its name. A slot that another address gets is taken out
    first: no request goes to one under the other's state.
    """
    states: dict[str, SlotState] = {
        address: "ready" if name in serving else "drain" for name, address in replicas.items()
    }
    commands: list[str] = []
    free: list[HaproxySlot] = []
    placed: set[str] = set()
    for slot in slots:
        wanted = states.get(slot.address)
        if wanted is None or slot.address in placed:
            free.append(slot)
            if slot.state != "maint":
                commands.append(_set(slot, "state maint"))
            continue
        placed.add(slot.address)
        if slot.state != wanted:
            commands.append(_set(slot, f"state {wanted}"))
    left = []
    for name, address in sorted(replicas.items()):
        if address in placed:
            continue
        placed.add(address)
        if not free:
            left.append(name)
            continue
        slot = free.pop(0)
        host, _, port = address.rpartition(":")
        commands.append(_set(slot, f"addr {host} port {port}"))
        commands.append(_set(slot, f"state {states[address]}"))
    return commands, left


def _set(slot: HaproxySlot, what: str) -> str:
    return f"set server {BACKEND}/{slot.name} {what}"


def haproxy_suspects(slots: Sequence[HaproxySlot], replicas: Mapping[str, str]) -> frozenset[str]:
    """The replicas that HAProxy gets no answer from; nobody if it gets none from all: then it is
    the one that is cut off."""
    up = {slot.address: slot.up for slot in slots if slot.state != "maint"}
    seen = {name: up[address] for name, address in replicas.items() if address in up}
    if not any(seen.values()):
        return frozenset()
    return frozenset(name for name, answers in seen.items() if not answers)
