"""The shared secret's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.cluster.mesh.protocol import connection_keys
from ckpt.cluster.secret import read_secret
from ckpt.errors import UsageError


def secret_file(path: Path, content: bytes, mode: int) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_secret_is_the_files_content_without_its_line_end(tmp_path: Path) -> None:
    text = b"0123456789abcdef" * 4
    assert read_secret(secret_file(tmp_path / "s", text + b"\n", 0o600)) == bytes.fromhex(
        text.decode()
    )


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"01" * 32, 0o640, "others"),
        (b"01" * 32, 0o604, "others"),
        (b"01" * 31, 0o600, "not a secret"),
    ],
)
def test_file_that_others_can_read_or_that_holds_no_secret_is_refused(
    tmp_path: Path, content: bytes, mode: int, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        read_secret(secret_file(tmp_path / "s", content, mode))


def test_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ckpt key new"):
        read_secret(tmp_path / "none")


def test_every_line_and_direction_has_a_key_of_its_own() -> None:
    keys = {
        key
        for job in ("a", "b")
        for one in (b"1" * 16, b"2" * 16)
        for other in (b"3" * 16, b"4" * 16)
        for key in connection_keys(b"secret", job=job, dialler=one, listener=other)
    }
    assert len(keys) == 16
