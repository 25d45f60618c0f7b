"""Lines between keepers, without sockets: who proves what, what a stranger can do, what order
means."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.cluster.mesh import protocol as cables
from ckpt.cluster.mesh.messages import (
    MeetingAddress,
    MeshDecided,
    MeshMessage,
    MeshPost,
    NodeHeartbeat,
)
from ckpt.cluster.mesh.protocol import FRAME_BYTES_MAX, MeshProtocol, MessageEncoder
from ckpt.errors import CkptError, StoreDeniedError, UsageError

SECRET = b"a secret of all nodes"
_numbers = itertools.count(1)


def nonce() -> bytes:
    return next(_numbers).to_bytes(16, "big")


def pair(
    *, secret: bytes = SECRET, job: str = "job", means: str = "b"
) -> tuple[MeshProtocol, MeshProtocol]:
    dialler = MeshProtocol(SECRET, job="job", node="a", nonce=nonce(), dials=means)
    listener = MeshProtocol(secret, job=job, node="b", nonce=nonce())
    return dialler, listener


def join(dialler: MeshProtocol, listener: MeshProtocol) -> None:
    """Carry what both say until both are quiet."""
    while True:
        there = dialler.data_to_send()
        back = listener.data_to_send()
        if not there and not back:
            return
        assert listener.receive_data(there) == []
        assert dialler.receive_data(back) == []


def test_both_ends_know_each_other_once_both_proved_themselves() -> None:
    dialler, listener = pair()
    assert not dialler.up and not listener.up
    join(dialler, listener)
    assert dialler.up and listener.up
    assert (dialler.peer, listener.peer) == ("b", "a")


def test_words_come_in_order_both_ways_however_they_are_cut() -> None:
    dialler, listener = pair()
    join(dialler, listener)
    words: list[MeshMessage] = [MeshPost(room="3", key=f"k{n}", value=bytes(n)) for n in range(50)]
    for word in words:
        dialler.send(word)
        listener.send(word)
    there, back = dialler.data_to_send(), listener.data_to_send()
    got = [
        word for at in range(0, len(there), 7) for word in listener.receive_data(there[at : at + 7])
    ]
    assert got == words
    assert dialler.receive_data(back) == words


@pytest.mark.parametrize(
    "wrong",
    [{"secret": b"another secret of nobody"}, {"job": "another"}, {"means": "c"}],
    ids=["secret", "job", "node"],
)
def test_stranger_never_comes_up(wrong: dict[str, object]) -> None:
    dialler, listener = pair(**wrong)  # type: ignore[arg-type]
    with pytest.raises(StoreDeniedError):
        join(dialler, listener)
    assert not listener.up and not dialler.up


def test_recorded_line_says_nothing_to_another_listener() -> None:
    dialler, listener = pair()
    first = dialler.data_to_send()
    listener.receive_data(first)
    dialler.receive_data(listener.data_to_send())
    proof = dialler.data_to_send()
    again = MeshProtocol(SECRET, job="job", node="b", nonce=nonce())
    again.receive_data(first)
    with pytest.raises(StoreDeniedError, match="message authentication failed"):
        again.receive_data(proof)
    assert not again.up


def test_word_that_is_played_twice_or_left_out_ends_the_line() -> None:
    for twice in (True, False):
        dialler, listener = pair()
        join(dialler, listener)
        dialler.send(NodeHeartbeat())
        one = dialler.data_to_send()
        dialler.send(MeshDecided(attempt=1, boundary=2, flags=1))
        other = dialler.data_to_send()
        if twice:
            listener.receive_data(one)
        with pytest.raises(StoreDeniedError):
            listener.receive_data(one if twice else other)


def test_own_words_reflected_are_refused() -> None:
    dialler, listener = pair()
    join(dialler, listener)
    dialler.send(NodeHeartbeat())
    with pytest.raises(StoreDeniedError):
        dialler.receive_data(dialler.data_to_send())


@settings(max_examples=300, deadline=None)
@given(
    at=st.integers(min_value=0),
    flip=st.integers(1, 255),
    stage=st.sampled_from(["greeting", "proof", "word"]),
)
def test_any_changed_byte_is_found_or_changes_nothing(at: int, flip: int, stage: str) -> None:
    dialler, listener = pair()
    word = MeshPost(room="1", key="k", value=b"value")
    if stage == "word":
        join(dialler, listener)
        dialler.send(word)
    elif stage == "proof":
        listener.receive_data(dialler.data_to_send())
        dialler.receive_data(listener.data_to_send())
    data = bytearray(dialler.data_to_send())
    data[at % len(data)] ^= flip
    try:
        got = listener.receive_data(bytes(data))
        if stage == "greeting":
            dialler.receive_data(listener.data_to_send())
            listener.receive_data(dialler.data_to_send())
    except CkptError:
        return
    # A longer length only waits for more; else nothing may have come up or been heard.
    assert got == []
    assert stage == "word" or not listener.up


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_noise_raises_only_our_errors_and_keeps_little(pieces: list[bytes]) -> None:
    listener = MeshProtocol(SECRET, job="job", node="b", nonce=nonce())
    try:
        for piece in pieces:
            assert listener.receive_data(piece) == []
    except CkptError:
        return
    assert not listener.up
    assert len(listener._in) <= 2 * cables.GREETING_BYTES_MAX + 200


def test_stranger_cannot_announce_a_long_frame() -> None:
    listener = MeshProtocol(SECRET, job="job", node="b", nonce=nonce())
    with pytest.raises(StoreDeniedError, match="length"):
        listener.receive_data((cables.GREETING_BYTES_MAX + 1).to_bytes(4, "little"))


def test_word_beyond_the_limit_is_refused_by_its_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    dialler, listener = pair()
    join(dialler, listener)
    monkeypatch.setattr(cables, "FRAME_BYTES_MAX", 100)
    with pytest.raises(UsageError, match="too long"):
        dialler.send(MeshPost(room="1", key="k", value=bytes(200)))


def test_what_is_said_to_all_is_spelled_once() -> None:
    spell = MessageEncoder()
    one, same = NodeHeartbeat(), NodeHeartbeat()
    assert spell(one) is spell(one)
    encoded = [spell(one), spell(same)]
    assert encoded[0] == encoded[1] and encoded[0] is not encoded[1], "equal words are two"
    assert spell(MeetingAddress(attempt=1, host="h", port=2)) != encoded[0]
    with pytest.raises(UsageError, match="too long"):
        spell(MeetingAddress(attempt=1, host="h" * FRAME_BYTES_MAX, port=2))
    assert spell(same) == encoded[1]
