"""Records of a serving group and the view of them. Pure.

``replicas/<name>`` is a replica's own, under its lease; ``roles`` says who serves, ``order`` what
an operator asked for last. Nothing in the keyspace is trusted: each value is checked when read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec

from ckpt.errors import IntegrityError, UsageError
from ckpt.values import SnapshotId

REPLICAS = "replicas/"
ROLES = "roles"
ORDER = "order"

ReplicaState = Literal["warming", "ready", "draining"]
Role = Literal["serving", "standby", "draining"]


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says of itself. ``name`` is new in each life of its process.

    ``address``: ``host:port`` that answers requests. ``generation``: the served one, ``kept``:
    those that it can serve at once; ``order``: the serial of the last order that it carried out,
    ``problem`` why it could not. ``repeatable``: paths whose requests may be sent again, to another
    replica, when nobody knows whether one was answered.
    """

    name: str
    address: str
    host: str = ""
    pid: int = 0
    state: ReplicaState = "warming"
    generation: str = ""
    kept: tuple[str, ...] = ()
    order: int = 0
    problem: str = ""
    repeatable: tuple[str, ...] = ()

    @property
    def served(self) -> SnapshotId | None:
        """The served generation; None if it serves none, or names none that can be read."""
        return _read_generation(self.generation)

    @property
    def in_memory(self) -> tuple[SnapshotId, ...]:
        """The kept generations, without names that cannot be read."""
        read = map(_read_generation, self.kept)
        return tuple(generation for generation in read if generation is not None)


class RolesRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who serves, by replica name, and how many are to serve. All other replicas stand by."""

    wanted: int
    serving: tuple[str, ...] = ()
    drained: tuple[str, ...] = ()
    """Replicas that an operator took out: they are not promoted again."""


class OrderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asked of all replicas; ``serial`` counts orders.

    ``follow``: what to follow (``latest``, ``tag:NAME`` or a step). ``generation``, if not empty:
    serve that one, from memory where it is kept, and stay there; it wins over ``follow``.
    """

    serial: int
    follow: str = "latest"
    generation: str = ""


@dataclass(frozen=True, slots=True)
class GroupView:
    """All records of a group at one revision. ``roles_revision``: 0 if there are no roles yet."""

    revision: int
    replicas: Mapping[str, ReplicaRecord] = field(default_factory=dict)
    roles: RolesRecord | None = None
    roles_revision: int = 0
    order: OrderRecord | None = None
    order_revision: int = 0

    def role(self, name: str) -> Role:
        """What a replica is to do now."""
        replica = self.replicas.get(name)
        if replica is not None and replica.state == "draining":
            return "draining"
        return "serving" if self.roles is not None and name in self.roles.serving else "standby"

    @property
    def serving(self) -> tuple[ReplicaRecord, ...]:
        """The replicas that take requests: placed, alive and ready."""
        names = self.roles.serving if self.roles is not None else ()
        found = (self.replicas.get(name) for name in names)
        return tuple(replica for replica in found if replica and replica.state == "ready")


def generation_name(generation: SnapshotId) -> str:
    """What replies and records call it: ``EPOCH-STEP``."""
    return f"{generation.epoch}-{generation.step}"


def parse_generation(text: str) -> SnapshotId:
    """The generation of that name. Raises UsageError."""
    epoch, _, step = text.partition("-")
    if not all(part.isascii() and part.isdigit() for part in (epoch, step)):
        raise UsageError(f"a generation is named EPOCH-STEP, as replies do. generation={text!r}")
    return SnapshotId(int(epoch), int(step))


def _read_generation(text: str) -> SnapshotId | None:
    try:
        return parse_generation(text)
    except UsageError:
        return None


Record = ReplicaRecord | RolesRecord | OrderRecord
R = TypeVar("R", bound=Record)


def encode(record: Record) -> bytes:
    """A record's stored form: JSON."""
    return msgspec.json.encode(record)


def decode_replica(key: str, data: bytes) -> ReplicaRecord:
    """Raises IntegrityError that names the key, as the other two."""
    replica = _decode(key, data, ReplicaRecord)
    if key != REPLICAS + replica.name:
        raise IntegrityError(
            f"a replica's record lies under another name. key={key} name={replica.name!r}"
        )
    return replica


def decode_roles(data: bytes) -> RolesRecord:
    """See ``decode_replica``."""
    return _decode(ROLES, data, RolesRecord)


def decode_order(data: bytes) -> OrderRecord:
    """See ``decode_replica``."""
    return _decode(ORDER, data, OrderRecord)


def _decode(key: str, data: bytes, kind: type[R]) -> R:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"a record of the serving group is not one. key={key}: {error}"
        ) from error
