"""Credentials, endpoints, encryption, certificates and proxies as users of fsspec give them, with
both clients."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kit.s3_clients import HASTY, open_with, through
from kit.servers.proxy import FaultProxy
from kit.servers.s3 import KEY, SECRET, Bucket, S3Server

from ckpt.backends.objects.fsspec_store import FsspecBackend
from ckpt.backends.objects.obstore_store import ForkAwareBackend
from ckpt.backends.objects.s3 import CLIENT_VARIABLE
from ckpt.backends.open import open_backend
from ckpt.errors import StoreDeniedError, UnavailableError, UsageError
from ckpt.testing.contract import read

pytestmark = pytest.mark.slow

LARGE = b"x" * (40 << 20)


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file and no variable of the machine's user."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def works(client: str, patch: pytest.MonkeyPatch, url: str, options: dict[str, object]) -> None:
    store = open_with(client, patch, url, options)
    store.put("a", [b"x"])
    assert read(store, "a") == b"x"
    store.close()


GIVEN: list[dict[str, object]] = [
    {"key": KEY, "secret": SECRET, "endpoint_url": "E"},
    {"username": KEY, "password": SECRET, "client_kwargs": {"endpoint_url": "E"}},
    {
        "client_kwargs": {
            "endpoint_url": "E",
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
        }
    },
    {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": "E",
        "client_kwargs": {"region_name": "us-east-1"},
    },
    {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": "E",
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    },
]


@pytest.mark.parametrize("options", GIVEN, ids=range(len(GIVEN)))
def test_options_reach_the_server(
    options: dict[str, object], client: str, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(value: object) -> object:
        if isinstance(value, dict):
            return {name: at(inner) for name, inner in value.items()}
        return s3_bucket.server.endpoint if value == "E" else value

    works(client, monkeypatch, s3_bucket.url, {name: at(value) for name, value in options.items()})


def test_environment_reaches_the_server(
    client: str, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_bucket.server.endpoint)
    works(client, monkeypatch, s3_bucket.url, {})


def test_profile_in_files_reaches_the_server(
    client: str, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n"
    )
    (tmp_path / "config").write_text("[profile mine]\nregion=us-east-1\n")
    endpoint = s3_bucket.server.endpoint
    works(client, monkeypatch, s3_bucket.url, {"profile": "mine", "endpoint_url": endpoint})
    monkeypatch.setenv("AWS_PROFILE", "mine")
    works(client, monkeypatch, s3_bucket.url, {"endpoint_url": endpoint})


def test_wrong_and_missing_credentials_are_denied(
    client: str, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = s3_bucket.server.endpoint
    for options in (
        {"key": KEY, "secret": "wrong"},
        {"key": "nobody", "secret": "x"},
        {"anon": True},
        {},
    ):
        store = open_with(client, monkeypatch, s3_bucket.url, {"endpoint_url": endpoint, **options})
        with pytest.raises(StoreDeniedError):
            store.put("a", [b"x"])


@pytest.mark.parametrize(
    ("extra", "headers"),
    [
        ({"ServerSideEncryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key-1"},
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "key-1",
            },
        ),
    ],
    ids=["AES256", "kms"],
)
def test_encryption_is_asked_for_with_every_object(
    extra: dict[str, str],
    headers: dict[str, str],
    client: str,
    moto_server: S3Server,
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket, proxy = moto_server.bucket(), fault_proxy(moto_server.endpoint)
    options = through(bucket, proxy.endpoint, s3_additional_kwargs=extra)
    store = open_with(client, monkeypatch, bucket.url, options)
    store.put("small", [b"x"])
    store.put("large", [LARGE])
    store.put("log/1", [b"x"], create_only=True)
    begins = [
        seen.request
        for seen in proxy.seen
        if (seen.request.method == "PUT" and not seen.request.query)
        or "uploads" in seen.request.query
    ]
    assert {request.path.rpartition("/")[2] for request in begins} >= {"small", "large", "1"}
    for request in begins:
        assert headers.items() <= request.headers.items()
    assert read(store, "large") == LARGE


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate authority of one's own, and a server's context with a certificate for 127.0.0.1
    by it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ckpt tests")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca, secret = tmp_path / "ca.pem", tmp_path / "key.pem"
    ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, secret)
    return ca, context


def test_own_certificate_authority_is_trusted_when_named_and_not_otherwise(
    authority: tuple[Path, ssl.SSLContext],
    s3_bucket: Bucket,
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca, context = authority
    proxy = fault_proxy(s3_bucket.server.endpoint, tls=context)
    options = through(s3_bucket, proxy.endpoint, config_kwargs=HASTY)
    for client in ("s3fs", "obstore"):
        store = open_with(client, monkeypatch, s3_bucket.url, options)
        with pytest.raises(UnavailableError):
            store.put("a", [b"x"])
        assert not proxy.seen
    monkeypatch.delenv(CLIENT_VARIABLE)
    named = open_backend(s3_bucket.url, {**options, "client_kwargs": {"verify": str(ca)}})
    assert isinstance(named, FsspecBackend), "obstore would trust the public authorities too"
    named.put("a", [b"x"])
    monkeypatch.setenv("AWS_CA_BUNDLE", str(ca))
    named = open_backend(s3_bucket.url, options)
    assert read(named, "a") == b"x"
    assert proxy.seen


def test_certificates_are_not_looked_at_where_that_is_asked_for(
    client: str,
    authority: tuple[Path, ssl.SSLContext],
    s3_bucket: Bucket,
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = fault_proxy(s3_bucket.server.endpoint, tls=authority[1])
    works(
        client,
        monkeypatch,
        s3_bucket.url,
        through(s3_bucket, proxy.endpoint, client_kwargs={"verify": False}),
    )


def test_requests_go_through_a_proxy(
    client: str,
    s3_bucket: Bucket,
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = fault_proxy(s3_bucket.server.endpoint)
    config = {"config_kwargs": {"proxies": {"http": proxy.endpoint}}}
    works(client, monkeypatch, s3_bucket.url, {**s3_bucket.options, **config})
    assert proxy.seen
    proxy.forget()
    monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
    monkeypatch.setenv("http_proxy", proxy.endpoint)
    works(client, monkeypatch, s3_bucket.url, s3_bucket.options)
    assert proxy.seen


def test_client_is_chosen_by_what_was_asked(
    s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ckpt")
    monkeypatch.delenv(CLIENT_VARIABLE, raising=False)
    odd: dict[str, object] = {
        **s3_bucket.options,
        "s3_additional_kwargs": {"StorageClass": "STANDARD"},
    }
    assert isinstance(open_backend(s3_bucket.url, s3_bucket.options), ForkAwareBackend)
    assert not caplog.records
    assert isinstance(open_backend(s3_bucket.url, odd), FsspecBackend)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "StorageClass" in caplog.text
    assert SECRET not in caplog.text
    assert isinstance(
        open_with("s3fs", monkeypatch, s3_bucket.url, s3_bucket.options), FsspecBackend
    )
    with pytest.raises(UsageError, match="StorageClass"):
        open_with("obstore", monkeypatch, s3_bucket.url, odd)
    with pytest.raises(UsageError, match="no such client"):
        open_with("curl", monkeypatch, s3_bucket.url, s3_bucket.options)


FORKING = """
import os, sys
from ckpt.backends.open import open_backend
url, options = sys.argv[1], eval(sys.argv[2])
store = open_backend(url, options)
store.put("parent", [b"x"])
child = os.fork()
if not child:
    out = bytearray(1)
    store.read_into("parent", memoryview(out))
    store.put("child", [bytes(out)])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(store.client_name, sorted(found.key for found in store.list("")))
"""


def test_child_of_a_fork_goes_on_with_the_other_client(s3_bucket: Bucket) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        FORKING,
        s3_bucket.url,
        repr(s3_bucket.options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "obstore ['child', 'parent']\n"


def test_neither_client_is_imported_before_a_store_needs_it() -> None:
    names = ("obstore", "s3fs", "botocore", "torch")
    code = (
        f"import sys, ckpt.backends.open; print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
