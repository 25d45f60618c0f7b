"""Where keys come from, and what is refused; no message ever holds one."""

from __future__ import annotations

import base64
import os
import secrets
import shlex
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends.encrypted import keys as encrypted_key
from ckpt.backends.encrypted.keys import command_output, load_key, load_keys, write_new_key
from ckpt.backends.encrypted.secret import EncryptionKey, parse_secret
from ckpt.errors import CkptError, UnavailableError, UsageError

SECRET = bytes(range(100, 132))
SPELLINGS = [
    SECRET,
    SECRET.hex().encode(),
    SECRET.hex().upper().encode() + b"\n",
    b"  " + base64.b64encode(SECRET) + b"\r\n",
    base64.urlsafe_b64encode(SECRET),
    base64.b64encode(SECRET).rstrip(b"="),
]
PASSPHRASES = [
    b"",
    b"\n",
    b"hunter2",
    b"correct horse battery staple",
    b"a passphrase of 32 characters...",
    SECRET.hex()[:32].encode(),
    SECRET.hex()[:62].encode(),
    SECRET.hex().encode() + b"00",
    b"correct horse battery staple and some more words until it is long",
    SECRET[:31],
    SECRET + b"\x80",
]


def private(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    path.chmod(0o600)
    return f"file:{path}"


def printing(text: str, *, before: str = "pass") -> str:
    """A command that prints ``text``."""
    return f"command:{shlex.quote(sys.executable)} -S -E -c {shlex.quote(f'{before}; print({text!r})')}"


@pytest.mark.parametrize("content", SPELLINGS)
def test_file_holds_a_key_in_any_spelling(tmp_path: Path, content: bytes) -> None:
    assert load_key(private(tmp_path / "key", content)).id == EncryptionKey.of(SECRET).id


@pytest.mark.parametrize("content", PASSPHRASES)
def test_passphrases_and_pieces_are_no_keys(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        load_key(private(tmp_path / "key", content))
    if content.strip():
        assert content.strip().decode(errors="replace") not in str(caught.value)


@given(secret=st.binary(min_size=32, max_size=32))
def test_every_spelling_of_any_bytes_means_those_bytes(secret: bytes) -> None:
    for text in (secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
        assert parse_secret(text, source="test") == secret


@given(material=st.binary(max_size=100))
def test_any_other_bytes_are_refused_without_being_shown(material: bytes) -> None:
    try:
        assert len(parse_secret(material, source="test")) == 32
    except UsageError as error:
        assert len(material) < 8 or material.hex() not in str(error)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o610])
def test_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    source = private(tmp_path / "key", SECRET)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(UsageError, match="chmod 600"):
        load_key(source)


def test_missing_file_folder_and_pipe_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("none", ".", "pipe", "a\0b"):
        with pytest.raises(UsageError):
            load_key(f"file:{tmp_path}/{name}")


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    private(tmp_path / "key", SECRET)
    assert load_key("file:~/key").id == EncryptionKey.of(SECRET).id
    made = write_new_key("~/new")
    assert load_key("file:~/new").id == made.id


def test_variable_holds_a_key_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET.hex())
    assert load_key("env:MY_KEY").id == EncryptionKey.of(SECRET).id
    monkeypatch.setenv("MY_KEY", "hunter2")
    with pytest.raises(UsageError) as caught:
        load_key("env:MY_KEY")
    assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UsageError, match="not set"):
        load_key("env:MY_KEY")


def test_command_prints_a_key_and_no_shell_sees_its_words(tmp_path: Path) -> None:
    assert load_key(printing(SECRET.hex())).id == EncryptionKey.of(SECRET).id
    trap = tmp_path / "made"
    with pytest.raises(CkptError):
        load_key(f"command:echo $(touch {trap}); touch {trap}")
    assert not trap.exists()


def test_failing_command_is_told_without_its_words() -> None:
    with pytest.raises(UnavailableError, match="status=3") as caught:
        load_key(printing(SECRET.hex(), before="import sys; print('hush-hush'); sys.exit(3)"))
    assert SECRET.hex() not in str(caught.value)
    assert "hush" not in str(caught.value)
    with pytest.raises(UsageError, match="can't be started"):
        load_key("command:/no/such/program --token abc")
    for words in ("command:", "command:   ", "command:'unclosed"):
        with pytest.raises(UsageError):
            load_key(words)


def test_command_that_prints_without_end_is_ended() -> None:
    with pytest.raises(UsageError, match="more than a key"):
        load_key("command:yes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", ["import time; time.sleep(600)", "import os, time; os.fork() or time.sleep(600)"]
)
def test_command_that_does_not_end_is_killed_with_what_it_started(code: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="did not end"):
        command_output([sys.executable, "-S", "-E", "-c", code], wait_s=0.5, bytes_max=100)
    assert time.monotonic() - begun < encrypted_key.COMMAND_S


@pytest.mark.parametrize(
    "source",
    ["", "key", SECRET.hex(), "vault:x", "file:", "env:", "FILE:x", "base64:abcd", "/a/path"],
)
def test_unknown_source_is_refused_and_not_shown(source: str) -> None:
    with pytest.raises(UsageError, match="not a source") as caught:
        load_key(source)
    assert len(source) < 8 or source not in str(caught.value)


def test_first_of_several_keys_is_written_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = secrets.token_bytes(32)
    monkeypatch.setenv("MY_KEY", other.hex())
    file = private(tmp_path / "a,b", SECRET)
    found = load_keys(f"{file},env:MY_KEY")
    assert (found.writing.id, [key.id for key in found.older]) == (
        EncryptionKey.of(SECRET).id,
        [EncryptionKey.of(other).id],
    )
    assert load_keys("env:MY_KEY").older == ()
    with pytest.raises(UsageError, match="twice"):
        load_keys(f"{file},env:MY_KEY,{file}")


def test_new_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = write_new_key(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(f"file:{path}").id == made.id
    before = path.read_bytes()
    with pytest.raises(UsageError, match="never overwritten"):
        write_new_key(str(path))
    assert path.read_bytes() == before
    assert write_new_key(str(tmp_path / "other")).id != made.id
    with pytest.raises(UsageError, match="can't be written"):
        write_new_key(str(tmp_path / "none" / "key"))
