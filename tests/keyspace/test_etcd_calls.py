"""How etcd is spoken to: endpoints that are silent, users, certificates, limits, forks."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

import pytest
from kit.etcd import EtcdCluster, require
from kit.membership.keyspace_contract import DEADLINE_S, get, put
from kit.membership.members_contract import info, until

from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.errors import CkptError, NotFoundError, StoreDeniedError, UnavailableError, UsageError
from ckpt.keyspace.address import EtcdOptions, split_endpoint
from ckpt.keyspace.base import Keys, Put, Transaction
from ckpt.keyspace.etcd import EtcdKeyspace

pytestmark = pytest.mark.slow

TTL_S = 5.0


def options(cluster: EtcdCluster) -> EtcdOptions:
    return EtcdOptions(endpoints=cluster.endpoints, call_s=5.0)


def quiet_get(keyspace: EtcdKeyspace, key: str) -> bytes | None:
    try:
        return get(keyspace, key)
    except UnavailableError:
        return None


def test_two_silent_endpoints_do_not_hide_the_third(etcd_one: EtcdCluster, job: str) -> None:
    with contextlib.ExitStack() as open_sockets:
        silent = []
        for _ in range(2):
            listener = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
            silent.append(f"127.0.0.1:{listener.getsockname()[1]}")
        keyspace = EtcdKeyspace(
            EtcdOptions(endpoints=(*silent, *etcd_one.endpoints), call_s=0.3), job
        )
        began_s = time.monotonic()
        put(keyspace, "a", b"1")
        assert time.monotonic() - began_s < 5.0
        took_s = []
        for _ in range(5):
            began_s = time.monotonic()
            assert get(keyspace, "a") == b"1"
            took_s.append(time.monotonic() - began_s)
        assert min(took_s) < 0.3  # and is asked first from now on
        keyspace.close()


def test_nobody_answers_and_the_error_says_who_was_asked(job: str) -> None:
    keyspace = EtcdKeyspace(EtcdOptions(endpoints=("127.0.0.1:1", "127.0.0.1:2"), call_s=0.3), job)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*127\.0\.0\.1:2"):
        get(keyspace, "a")
    with pytest.raises(UnavailableError):
        keyspace.revoke(7)
    keyspace.close()
    with pytest.raises(UnavailableError, match="closed"):
        get(keyspace, "a")


def test_a_connection_does_not_outlive_a_fork(etcd_one: EtcdCluster, job: str) -> None:
    keyspace = EtcdKeyspace(options(etcd_one), job)
    keyspace._calls._pid += 1  # as in a child
    with pytest.raises(UsageError, match="fork"):
        get(keyspace, "a")
    keyspace._calls._pid = os.getpid()
    keyspace.close()


def test_what_etcd_can_not_take_is_the_callers_mistake(etcd_one: EtcdCluster, job: str) -> None:
    keyspace = EtcdKeyspace(options(etcd_one), job)
    with pytest.raises(UsageError, match="larger than max"):
        put(keyspace, "a", bytes(2 << 20))
    with pytest.raises(UsageError, match="too large"):
        put(keyspace, "a", bytes(1_600_000))
    with pytest.raises(NotFoundError):
        put(keyspace, "a", b"", 12345)
    assert keyspace.transact(
        Transaction(then=tuple(Put(f"k{n}", b"") for n in range(100)))
    ).succeeded
    keyspace.close()


def test_two_jobs_share_no_keys(etcd_one: EtcdCluster) -> None:
    name = secrets.token_hex(4)
    one, other = (
        EtcdKeyspace(options(etcd_one), name),
        EtcdKeyspace(options(etcd_one), f"{name}/nodes"),
    )
    put(one, "nodes/a", b"1")
    assert get(other, "a") is None
    assert other.transact(Transaction(reads=(Keys("", "~"),))).found == ((),)
    one.close()
    other.close()


@pytest.mark.parametrize("endpoint", ["", "h:", "h:x", "h:0", "h:70000", "http://h:1", ":7"])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError):
        EtcdOptions(endpoints=(endpoint,))


def test_endpoints_are_read_as_people_write_them() -> None:
    assert split_endpoint("h") == ("h", 2379)
    assert split_endpoint("h:1") == ("h", 1)
    assert split_endpoint("[::1]:7") == ("[::1]", 7)
    assert split_endpoint("[::1]") == ("[::1]", 2379)


def test_a_keepalive_thread_outlives_whatever_is_raised(etcd_one: EtcdCluster, job: str) -> None:
    class Spiteful(EtcdKeyspace):
        errors: list[Exception]

        def renew(self, lease_id: int) -> float:
            if self.errors:
                raise self.errors.pop()
            return super().renew(lease_id)

    keyspace = Spiteful(options(etcd_one), job)
    keyspace.errors = []
    member = KeyspaceMembership(keyspace, job, ttl_s=TTL_S)
    member.join(info())
    keyspace.errors = [
        RuntimeError("a"),
        CkptError("b"),
        UnavailableError("c"),
        ValueError("d"),
        OSError("e"),
    ]
    until(lambda: not keyspace.errors)
    first_s = member.lease_status().act_until_s
    until(lambda: member.lease_status().act_until_s > first_s)
    assert member.lease_status().state is LeaseState.VALID
    member.leave()


def test_a_user_needs_the_right_password(tmp_path: Path, etcd_one: EtcdCluster, job: str) -> None:
    etcdctl = require("etcdctl")
    with EtcdCluster(tmp_path / "auth", 1, more=("--auth-token-ttl", "1")) as cluster:
        host, port = split_endpoint(cluster.endpoints[0])
        environment = {**os.environ, "ETCDCTL_API": "3"}
        for words in ("user add root:top", "user grant-role root root", "auth enable"):
            command = [etcdctl, "--endpoints", f"{host}:{port}", *words.split()]
            subprocess.run(command, check=True, capture_output=True, env=environment)
        right = EtcdOptions(endpoints=cluster.endpoints, user="root", password="top", call_s=5.0)
        assert "top" not in repr(right)
        keyspace = EtcdKeyspace(right, job)
        put(keyspace, "a", b"1")
        cluster.stop()  # it forgets the tokens that it gave out
        cluster.start()
        until(lambda: quiet_get(keyspace, "a") == b"1")
        member = KeyspaceMembership(keyspace, job, ttl_s=TTL_S)
        member.join(info())
        view = member.view()
        assert not member.wait_change(view.revision, timeout_s=0.1)
        member.put_fact("holdings", b"1")
        assert member.wait_change(view.revision, timeout_s=DEADLINE_S)
        member.leave()
        wrong = EtcdKeyspace(
            EtcdOptions(endpoints=cluster.endpoints, user="root", password="no", call_s=5.0), job
        )
        with pytest.raises(StoreDeniedError):
            get(wrong, "a")
        wrong.close()
        nobody = EtcdKeyspace(EtcdOptions(endpoints=cluster.endpoints, call_s=5.0), job)
        with pytest.raises(StoreDeniedError):
            get(nobody, "a")
        nobody.close()


def test_calls_and_watches_go_over_tls_with_certificates_on_both_sides(
    tmp_path: Path, etcd_one: EtcdCluster, job: str
) -> None:
    files = make_certificates(tmp_path)
    more = (
        "--cert-file",
        str(files["server"]),
        "--key-file",
        str(files["server-key"]),
        "--trusted-ca-file",
        str(files["ca"]),
        "--client-cert-auth",
    )
    with EtcdCluster(tmp_path / "tls", 1, scheme="https", more=more) as cluster:
        good = EtcdOptions(
            endpoints=cluster.endpoints,
            ca=files["ca"],
            cert=files["client"],
            key=files["client-key"],
            call_s=5.0,
        )
        member = KeyspaceMembership(EtcdKeyspace(good, job), job, ttl_s=TTL_S)
        member.join(info())
        view = member.view()
        assert not member.wait_change(view.revision, timeout_s=0.1)
        member.put_fact("holdings", b"1")
        assert member.wait_change(view.revision, timeout_s=DEADLINE_S)
        member.leave()
        for bad in (
            EtcdOptions(endpoints=cluster.endpoints, call_s=1.0),
            EtcdOptions(endpoints=cluster.endpoints, ca=files["ca"], call_s=1.0),
            EtcdOptions(endpoints=cluster.endpoints, ca=files["client"], call_s=1.0),
        ):
            keyspace = EtcdKeyspace(bad, job)
            with pytest.raises(UnavailableError):
                get(keyspace, "a")
            keyspace.close()


def make_certificates(folder: Path) -> dict[str, Path]:
    """An authority, a server and a client, with OpenSSL."""
    files = {
        name: folder / f"{name}.pem"
        for name in ("ca", "ca-key", "server", "server-key", "client", "client-key")
    }

    def openssl(*words: str) -> None:
        subprocess.run([require("openssl"), *words], check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl(
        "req",
        "-x509",
        *key,
        "-subj",
        "/CN=ca",
        "-keyout",
        str(files["ca-key"]),
        "-out",
        str(files["ca"]),
    )
    for name in ("server", "client"):
        openssl(
            "req",
            "-x509",
            *key,
            "-subj",
            f"/CN={name}",
            "-keyout",
            str(files[f"{name}-key"]),
            "-out",
            str(files[name]),
            "-CA",
            str(files["ca"]),
            "-CAkey",
            str(files["ca-key"]),
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=CA:FALSE",
            "-addext",
            "extendedKeyUsage=serverAuth,clientAuth",
        )
    return files
