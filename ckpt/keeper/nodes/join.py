"""How a keeper gets among the nodes of its job: membership, lines, and the judge of failures, put
together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timezone

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.membership.decide import MembershipOptions
from ckpt.cluster.membership.open import open_membership
from ckpt.cluster.membership.records import NodeInfo
from ckpt.cluster.membership.transactions import agent_fact
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.node.epochs import NodeDeps, NodeObserver
from ckpt.cluster.node.leading import FLOOR_CAPABILITY, PEER_CAPABILITY, EpochNote, FailureDecision
from ckpt.cluster.node.node import Node
from ckpt.cluster.tls import check_network, check_tls, job_tls
from ckpt.errors import UsageError
from ckpt.events import Emit, Event
from ckpt.ipc.cluster_spec import NodesSpec, host_towards
from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.events import Failure
from ckpt.keeper.attempts.failures import (
    EndJob,
    EpochFailures,
    FailureHistory,
    StartNextEpoch,
    WaitForCause,
    decide,
)
from ckpt.keyspace.address import ETCD_SCHEME, keyspace_location

VALID_S_WANTED = 86_400.0
"""A certificate that ends sooner is an alarm: connections that are made after its end fail."""


@dataclass(frozen=True, slots=True)
class KeeperFacts:
    """What is asked of this keeper, from the node's threads.

    ``attempt``: the greatest that it knows of; ``completed``: the most steps that one of its ranks
    has, -1: none.
    """

    policy: Callable[[], Policy]
    attempt: Callable[[], int]
    completed: Callable[[], int]


def check_spec(spec: NodesSpec) -> None:
    """Raises UsageError where nodes could not know each other, or what they lend each other could
    be read by anybody."""
    if spec.agent:
        agent_fact(spec.agent)
    if not spec.secret and spec.where.startswith(ETCD_SCHEME):
        raise UsageError(
            f"nodes that meet in etcd need a secret. where={spec.where}; name a file of 64 hex "
            "digits that only you can read, "
            "the same on all nodes"
        )
    host = spec.host or host_towards(spec.where)
    check_network(spec, host)
    check_tls(spec, host)


def join(
    spec: NodesSpec,
    secret: bytes,
    *,
    host: str,
    ranks: int,
    peer_port: int,
    here: KeeperFacts,
    told: NodeObserver,
    emit: Emit,
) -> Node:
    """This machine as a node with ``ranks`` ranks; it lends its memory at ``peer_port``. Waits for
    nothing."""
    witnesses = _witnesses(spec)
    tls = job_tls(spec)
    _tell_validity(check_tls(spec, host), emit)

    def lines(node: str, heard: MeshObserver) -> Mesh:
        return Mesh(
            secret, job=spec.job, node=node, listen=f"{host}:0", observer=heard, emit=emit, tls=tls
        )

    def info() -> NodeInfo:
        name = socket.gethostname()
        return NodeInfo(
            node=f"{_printable(name)}-{os.urandom(6).hex()}",
            host=name,
            slots=ranks,
            domain=spec.domain,
            address=host,
            capabilities=(
                f"{PEER_CAPABILITY}{memory_address(host, peer_port)}",
                f"{FLOOR_CAPABILITY}{here.attempt()}",
            ),
        )

    def judged(
        note: EpochNote,
        failures: Mapping[str, said.NodeFailed],
        lost: Mapping[str, float],
        ended: AbstractSet[str],
        heard_s: Mapping[str, float],
        now_s: float,
    ) -> FailureDecision:
        known = EpochFailures({}, lost, ended, here.completed())
        return _judged(note, failures, known, heard_s, now_s, here.policy())

    return Node(
        open_membership(
            keyspace_location(spec),
            spec.job,
            ttl_s=spec.ttl_s,
            witnesses_min=witnesses,
            on_act_until=told.on_act_until,
        ),
        info,
        MembershipOptions(
            nodes_min=spec.nodes_min,
            nodes_max=spec.nodes_max,
            last_call_s=spec.last_call_s,
            shrink_wait_s=spec.shrink_wait_s,
            witnesses_min=witnesses,
        ),
        decide_failures=judged,
        observer=told,
        emit=emit,
        deps=NodeDeps(lines, lambda: (host, free_port(host)), spec.agent),
        grow_wait_s=spec.grow_wait_s,
    )


def memory_address(host: str, port: int) -> str:
    """Where this node lends its memory, as others read it."""
    return str(Endpoint(host, port, plaintext=True))


def free_port(host: str) -> int:
    """A port that nobody listens on now. Whoever takes it in between makes an attempt fail, which
    is repeated."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _judged(
    note: EpochNote,
    failures: Mapping[str, said.NodeFailed],
    known: EpochFailures,
    heard_s: Mapping[str, float],
    now_s: float,
    policy: Policy,
) -> FailureDecision:
    """What ``judge`` makes of it, as the membership's leader takes it."""
    told = {
        node: Failure(
            one.rank,
            one.kind,
            one.text,
            one.status,
            heard_s[node],
            one.fingerprint,
            one.step,
            one.final,
        )
        for node, one in failures.items()
    }
    completed = max(known.completed, *[one.completed for one in failures.values()], -1)
    record = FailureHistory(
        note.fingerprint, note.step, note.same, note.stuck, note.completed, note.overdue
    )
    match decide(EpochFailures(told, known.lost, known.ended, completed), record, policy, now_s):
        case StartNextEpoch(after, text):
            return FailureDecision(_note(after, text))
        case EndJob(status, text):
            return FailureDecision(_note(record, text, end=status))
        case WaitForCause(until_s):
            return FailureDecision(until_s=until_s)
        case _:
            return FailureDecision()


def _note(record: FailureHistory, text: str, *, end: int | None = None) -> EpochNote:
    return EpochNote(
        why=text,
        fingerprint=record.fingerprint,
        step=record.step,
        same=record.same,
        stuck=record.stuck,
        completed=record.completed,
        overdue=record.overdue,
        end=end,
    )


def _tell_validity(ends_s: float | None, tell: Emit) -> None:
    if ends_s is not None:
        until = datetime.fromtimestamp(ends_s, timezone.utc).isoformat()
        text = f"nodes speak TLS; this node's certificate is valid until {until}, and is read when a launch begins"
        tell(Event("tls", text, alarm=ends_s - time.time() < VALID_S_WANTED))


def _witnesses(spec: NodesSpec) -> int:
    """Of two nodes only one is left to see the other's end."""
    return 2 if spec.nodes_max > 2 else 1


def _printable(host: str) -> str:
    return (
        "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in host)[:40]
        or "node"
    )
