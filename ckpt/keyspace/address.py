"""Which keyspace a job's nodes meet in: an etcd, or a file of this machine.

Importable without the packages that connect to etcd.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

PORT = 2379


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """Address and credentials of etcd. ``endpoints``: ``host:port`` each; files are paths of PEM
    files.

    With ``ca`` all calls use TLS; ``cert`` and ``key`` are this client's own. ``call_s``: the time
    limit of a call to one endpoint.
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
    """Where the nodes of a job meet. Raises UsageError if a file that it names cannot be read."""
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
    """Options from ``etcd://host:port,host:port``. Raises UsageError.

    Optional query: ``?ca=FILE&cert=FILE&key=FILE&user=NAME&password_file=FILE``.
    """
    hosts, _, query = address.partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UsageError(f"not an address of etcd. address={address!r} why={error}") from error
    if not hosts.startswith(ETCD_SCHEME) or (unknown := sorted(set(options) - _GIVEN)):
        problem = (
            f"unknown={unknown}" if hosts.startswith(ETCD_SCHEME) else "it begins with etcd://"
        )
        raise UsageError(f"not an address of etcd. address={address!r} {problem}")
    return EtcdOptions(
        endpoints=_endpoints(hosts),
        ca=_path(options.get("ca", "")),
        cert=_path(options.get("cert", "")),
        key=_path(options.get("key", "")),
        user=options.get("user"),
        password=_password(options.get("password_file", "")),
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
