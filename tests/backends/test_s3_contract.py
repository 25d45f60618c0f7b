"""Both clients keep the whole contract on both real servers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from kit.servers.s3 import S3Server

from ckpt.backends.objects.fsspec_store import FsspecBackend
from ckpt.backends.open import open_backend
from ckpt.testing.contract import BackendContract, BackendRaceContract, Opener

pytestmark = pytest.mark.slow


class TestS3fsOnGateway(BackendContract):
    @pytest.fixture(autouse=True)
    def server(self, s3_server: S3Server) -> None:
        self.bucket = s3_server.bucket()

    def opener(self, folder: Path) -> Opener:
        return functools.partial(FsspecBackend, self.bucket.url, self.bucket.options)


class TestObstoreOnGateway(BackendContract):
    @pytest.fixture(autouse=True)
    def server(self, s3_server: S3Server) -> None:
        self.bucket = s3_server.bucket()

    def opener(self, folder: Path) -> Opener:
        return functools.partial(open_backend, self.bucket.url, self.bucket.options)


class TestObstoreOnMoto(BackendRaceContract):
    @pytest.fixture(autouse=True)
    def server(self, moto_server: S3Server) -> None:
        self.bucket = moto_server.bucket()

    def opener(self, folder: Path) -> Opener:
        # Below a prefix, as several jobs share a bucket.
        return functools.partial(open_backend, f"{self.bucket.url}/some/run", self.bucket.options)


class TestS3fsOnMoto(BackendRaceContract):
    @pytest.fixture(autouse=True)
    def server(self, moto_server: S3Server) -> None:
        self.bucket = moto_server.bucket()

    def opener(self, folder: Path) -> Opener:
        return functools.partial(FsspecBackend, self.bucket.url, self.bucket.options)
