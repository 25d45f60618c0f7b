"""Records and words of a job of any size, made by the code that makes them in a job; for the other
files of that kind here."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.cluster.membership.records import EpochRecord, NodeInfo, NodePlacement
from ckpt.cluster.mesh.messages import InventoryEntry, MeshMessage
from ckpt.cluster.mesh.protocol import NONCE_BYTES, MeshProtocol
from ckpt.cluster.node.leading import FLOOR_CAPABILITY, PEER_CAPABILITY, EpochNote, encode_note
from ckpt.format.keys import part_key, writer_name
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.records import Commit, Record, make_record
from ckpt.keeper.mirrors.plan import merge_ranges
from ckpt.save.receipts import Receipt, ReplicaGroup
from ckpt.values import SnapshotId

RANKS_A_NODE = 8
NEWEST = SnapshotId(7, 123_456)
ORIGIN = "0123456789abcdef0123456789abcdef"
DIGEST = "0123456789abcdef0123456789abcdef"
SLOTS = 3
KEPT = 2
"""Pairs in mirrors: the named one and the one before it (``keeper/mirror_rounds.py``)."""


def node_name(number: int) -> str:
    """As ``keeper/nodes_join.py`` draws it: a host and 12 hex digits."""
    return f"gpu-{number:06d}-{(number * 2654435761) % (1 << 48):012x}"


def node_info(number: int) -> NodeInfo:
    """What a node says when it joins."""
    host = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return NodeInfo(
        node=node_name(number),
        host=f"gpu-{number:06d}",
        slots=RANKS_A_NODE,
        domain=f"rack-{number // 16:05d}",
        address=f"{host}:45678",
        capabilities=(f"{PEER_CAPABILITY}{host}:45679", f"{FLOOR_CAPABILITY}7"),
    )


def epoch_record(nodes: int) -> EpochRecord:
    """An epoch of so many nodes."""
    return EpochRecord(
        job="train",
        number=8,
        places=tuple(NodePlacement(node_name(n), RANKS_A_NODE) for n in range(nodes)),
        leader=node_name(3),
        nodes_min=max(1, nodes - 8),
        nodes_max=nodes,
        note=encode_note(EpochNote(why="node gpu-000003 was lost", era=5)),
    )


def manifest(nodes: int) -> Manifest:
    """The root record of a snapshot of so many nodes: one part each."""
    ranks = nodes * RANKS_A_NODE
    return Manifest(
        job="train",
        snapshot=NEWEST,
        world_size=ranks,
        parts=tuple(part_ref(node) for node in range(nodes)),
        size_bytes=ranks << 33,
        new_bytes=ranks << 33,
        created_unix_s=1.8e9,
        base=SnapshotId(7, 123_000),
        metadata={"loss": 1.25},
    )


def part_ref(node: int) -> PartRef:
    """One node's part as receipts and the manifest name it."""
    writer = writer_name(f"gpu-{node:06d}", f"{node:016x}")
    return PartRef(
        key=part_key(NEWEST, writer),
        digest=DIGEST,
        size_bytes=640_000,
        rank=node * RANKS_A_NODE,
        ranks=RANKS_A_NODE,
    )


def receipt(node: int) -> Receipt:
    """What one node's head says of a snapshot; all its ranks train alike."""
    return Receipt(
        snapshot=NEWEST,
        rank=node * RANKS_A_NODE,
        ranks=RANKS_A_NODE,
        refs=(part_ref(node),),
        size_bytes=8 << 33,
        new_bytes=8 << 33,
        base=SnapshotId(7, 123_000),
        shared={"dp": ReplicaGroup(100_000, DIGEST, RANKS_A_NODE)},
        stores=((DIGEST,),),
    )


def commit_record() -> Record:
    """The record that makes a snapshot exist."""
    body = Commit(NEWEST, DIGEST, SnapshotId(7, 123_000))
    return make_record(body, job="train", seq=12_345, epoch=8, write_id=DIGEST, prev=DIGEST)


def holdings(
    node: int, nodes: int, *, slots: int = SLOTS, kept: int = KEPT
) -> list[InventoryEntry]:
    """What one node holds: its ranks' slots, mirrors of its own ranks and of its partner's
    (``mirrors=1``: nodes in pairs)."""
    partner = node ^ 1 if node ^ 1 < nodes else max(0, node - 2)
    found = []
    for back in range(max(slots, kept)):
        pair = SnapshotId(NEWEST.epoch, NEWEST.step - back)
        for owner, mirror, there in (
            (node, False, back < slots),
            (node, True, back < kept),
            (partner, True, back < kept),
        ):
            if there:
                found.append(
                    InventoryEntry(
                        snapshot=pair,
                        origin=ORIGIN,
                        world_size=nodes * RANKS_A_NODE,
                        rank=owner * RANKS_A_NODE,
                        ranks=RANKS_A_NODE,
                        mirror=mirror,
                    )
                )
    return merge_ranges(found)


def all_holdings(
    nodes: int, *, slots: int = SLOTS, kept: int = KEPT
) -> dict[str, Sequence[InventoryEntry]]:
    """What every node holds."""
    return {node_name(n): holdings(n, nodes, slots=slots, kept=kept) for n in range(nodes)}


def line() -> tuple[MeshProtocol, MeshProtocol]:
    """Two ends that have proven themselves to each other."""
    dialler = MeshProtocol(bytes(32), job="train", node="a", nonce=bytes(NONCE_BYTES), dials="b")
    listener = MeshProtocol(bytes(32), job="train", node="b", nonce=bytes([1] * NONCE_BYTES))
    for _ in range(2):
        listener.receive_data(dialler.data_to_send())
        dialler.receive_data(listener.data_to_send())
    assert dialler.up and listener.up
    return dialler, listener


def across(ends: tuple[MeshProtocol, MeshProtocol], word: MeshMessage) -> tuple[int, bytes]:
    """A word's bytes on the wire, and the bytes themselves for the other end."""
    ends[0].send(word)
    data = ends[0].data_to_send()
    return len(data), data
