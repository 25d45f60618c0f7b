"""What a launcher's words mean: the etcd, or the file of this machine, in which a job's nodes
meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

# Where etcd is and how it is spoken to; known without the packages that speak to it.

PORT = 2379


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """Where etcd is and how it is spoken to. ``endpoints``: ``host:port`` each; files are paths of
    PEM files.

    With ``ca`` all calls go over TLS; ``cert`` and ``key`` are this client's own.
    ``call_timeout_s``: how long one endpoint may take.
    """

    endpoints: tuple[str, ...]
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    call_s: float = 0.8

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise UsageError("etcd needs an endpoint. endpoints=() name host:port")
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise UsageError(
                "a client certificate needs its key, and the authority's certificate. name ca, "
                "cert and key"
            )
        if (self.user is None) != (self.password is None):
            raise UsageError("a user needs a password. name both or none")
        for endpoint in self.endpoints:
            split_endpoint(endpoint)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port``, ``[v6]:port`` or ``host``. Raises UsageError."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        host, port = endpoint, str(PORT)
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"not an etcd endpoint. endpoint={endpoint!r} name host:port")
    return host, int(port)


ETCD_SCHEME = "etcd://"
_GIVEN = {"ca", "cert", "key", "user", "password_file"}


def keyspace_location(spec: NodesSpec) -> EtcdOptions | Path:
    """Where the nodes of a job meet. Raises UsageError where a file that it names can't be read."""
    if not spec.where.startswith(ETCD_SCHEME):
        return Path(spec.where)
    return EtcdOptions(
        endpoints=_endpoints(spec.where),
        ca=_path(spec.ca_file),
        cert=_path(spec.cert_file),
        key=_path(spec.key_file),
        user=spec.user or None,
        password=_password(spec.password_file),
    )


def parse_etcd_url(address: str) -> EtcdOptions:
    """``etcd://host:port,host:port``, then perhaps
    ``?ca=FILE&cert=FILE&key=FILE&user=NAME&password_file=FILE``. UsageError."""
    hosts, _, query = address.partition("?")
    try:
        given = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UsageError(f"not an address of etcd. address={address!r} why={error}") from error
    if not hosts.startswith(ETCD_SCHEME) or (unknown := sorted(set(given) - _GIVEN)):
        what = f"unknown={unknown}" if hosts.startswith(ETCD_SCHEME) else "it begins with etcd://"
        raise UsageError(f"not an address of etcd. address={address!r} {what}")
    return EtcdOptions(
        endpoints=_endpoints(hosts),
        ca=_path(given.get("ca", "")),
        cert=_path(given.get("cert", "")),
        key=_path(given.get("key", "")),
        user=given.get("user"),
        password=_password(given.get("password_file", "")),
    )


def _endpoints(where: str) -> tuple[str, ...]:
    return tuple(where.removeprefix(ETCD_SCHEME).split(","))


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _password(path: str) -> str | None:
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(
            f"etcd's password can't be read. path={path} why={error.strerror}"
        ) from error
