"""The secret: where it lies, that it is never shown, and what is made of it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from ckpt.cluster.peermem import body_mac as macs
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.secret import load_secret, write_new_secret
from ckpt.errors import UsageError

RAW = bytes(range(32))


def test_a_new_secret_is_read_back_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    written = write_new_secret(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_secret(path) == written
    with pytest.raises(UsageError, match="can't be written"):
        write_new_secret(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o660, 0o777])
def test_a_secret_that_others_may_touch_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    write_new_secret(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"mode={mode:04o}; chmod 600") as found:
        load_secret(path)
    assert path.read_text().strip() not in str(found.value)


@pytest.mark.parametrize(
    "text", [b"", b"password", b"ab" * 31, b"ab" * 33, b"AB" * 32, RAW, b"00" * 32, b"g" * 64, b"ab" * 32 + b"\n\n"]
)
def test_what_is_no_secret_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(UsageError):
        load_secret(path)


def test_a_folder_a_pipe_and_nothing_are_no_secret(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in (".", "pipe", "none"):
        with pytest.raises(UsageError):
            load_secret(tmp_path / name)


def test_a_secret_is_neither_shown_nor_pickled() -> None:
    secret = PeerSecret.of(RAW)
    keys = secret.session(b"h" * 32, b"w" * 32)
    for shown in (repr(secret), str(secret), repr(keys)):
        assert RAW.hex() not in shown
        assert repr(secret._root) not in shown
        assert repr(keys.request_head) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_every_key_differs_from_every_other() -> None:
    found = set()
    for raw in (RAW, RAW[::-1]):
        secret = PeerSecret.of(raw)
        for hello in (b"h" * 32, b"i" * 32):
            found |= {secret.hello_mac(hello), secret.welcome_mac(hello, b"")}
            for welcome in (b"w" * 32, b"x" * 32):
                keys = secret.session(hello, welcome)
                found |= {keys.request_head, keys.request_body, keys.answer_head, keys.answer_body}
    assert len(found) == 2 * (2 * 2 + 2 * 2 * 4)


@pytest.mark.parametrize("name", [macs.GMAC, macs.HMAC])
def test_a_body_mac_depends_on_all_that_it_covers_and_not_on_the_pieces(name: str) -> None:
    def tag(key: bytes = RAW, counter: int = 1, head: bytes = b"head", *pieces: bytes) -> bytes:
        one = macs.body_mac(name, key, counter=counter, head_mac=head)
        for piece in pieces:
            one.update(piece)
        return one.tag()

    body = bytes(range(256)) * 40
    whole = tag(RAW, 1, b"head", body)
    assert len(whole) == 16
    assert whole == tag(RAW, 1, b"head", body[:5], b"", body[5:9000], body[9000:])
    others = {
        tag(RAW[::-1], 1, b"head", body), tag(RAW, 2, b"head", body), tag(RAW, 1, b"heaD", body),
        tag(RAW, 1, b"head", body[:-1]),
        tag(RAW, 1, b"head", body + b"\0"), tag(RAW, 1, b"head", b"\1" + body[1:]), tag(RAW, 1, b"head"),
    }  # fmt: skip
    assert len(others | {whole}) == 8


def test_an_unknown_mac_is_refused() -> None:
    with pytest.raises(UsageError):
        macs.body_mac("crc32", RAW, counter=1, head_mac=b"")
