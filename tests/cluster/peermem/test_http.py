"""Heads have one spelling: what we write is read back, and nothing else is read."""

from __future__ import annotations

import http.client
import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends.base import is_key
from ckpt.cluster.peermem.auth import mac
from ckpt.cluster.peermem.http import (
    FIELDS_MAX,
    HEAD_BYTES_MAX,
    RANGES_MAX,
    DeltaBase,
    MalformedError,
    PeerAnswer,
    PeerHello,
    PeerRequest,
    PeerWelcome,
    Verb,
    encode_head,
    parse_head,
    split_mac,
    unsigned,
    unsigned_refusal,
    with_mac,
)
from ckpt.testing.contract import ODD_KEYS

KEY = bytes(32)
BOOT = "0123456789abcdef" * 2
NUMBERS = st.integers(0, 10**18 - 1)
NONCES = st.binary(min_size=16, max_size=16).map(bytes.hex)
KEYS = st.text(min_size=1, max_size=60).filter(is_key) | st.sampled_from(
    [f"odd/{key}" for key in ODD_KEYS]
)
LENGTHS = st.integers(0, 1 << 50)


@st.composite
def based(draw: st.DrawFn, put: PeerRequest) -> PeerRequest:
    ranges, sent_bytes = draw(st.integers(0, RANGES_MAX)), draw(LENGTHS)
    size = sent_bytes + draw(LENGTHS)
    base = DeltaBase(key=draw(KEYS), version=draw(NUMBERS), size_bytes=size, ranges=ranges)
    return replace(put, base=base, body_bytes=base.table_bytes + sent_bytes)


@st.composite
def requests(draw: st.DrawFn) -> PeerRequest:
    verb: Verb = draw(st.sampled_from(("PUT", "GET", "HEAD", "LIST", "DELETE")))
    one = PeerRequest(
        verb=verb, key=draw(KEYS), boot=draw(NONCES), epoch=draw(NUMBERS), counter=draw(NUMBERS)
    )
    match verb:
        case "PUT":
            put = replace(
                one,
                body_bytes=draw(LENGTHS),
                create_only=draw(st.booleans()),
                waits=draw(st.booleans()),
            )
            return draw(st.just(put) | based(put))
        case "GET":
            return replace(one, span=(draw(LENGTHS), draw(LENGTHS) + 1))
        case "LIST":
            return replace(one, key=draw(st.text(max_size=60)), after=draw(st.text(max_size=60)))
        case _:
            return one


ANSWERS = st.builds(
    PeerAnswer,
    status=st.sampled_from(
        (200, 201, 204, 206, 400, 401, 403, 404, 409, 412, 413, 416, 421, 424, 503, 507)
    ),
    boot=NONCES,
    epoch=NUMBERS,
    counter=NUMBERS,
    body_bytes=LENGTHS,
    size_bytes=LENGTHS,
    version=NUMBERS,
    modified_us=NUMBERS,
    more=st.booleans(),
    why=st.from_regex(r"[!-~]([ -~]{0,40}[!-~])?", fullmatch=True),
)


@given(requests())
def test_a_request_is_read_as_it_was_meant(request: PeerRequest) -> None:
    assert PeerRequest.parse(parse_head(request.encode("127.0.0.1:80"))) == request


@given(ANSWERS)
def test_an_answer_is_read_as_it_was_meant(answer: PeerAnswer) -> None:
    assert PeerAnswer.parse(parse_head(answer.encode())) == answer


@given(NONCES, NONCES, NUMBERS)
def test_hello_and_welcome_are_read_as_they_were_meant(one: str, other: str, epoch: int) -> None:
    hello, welcome = PeerHello(one, ("gmac", "hmac-sha256")), PeerWelcome(one, other, epoch, "gmac")
    assert PeerHello.parse(parse_head(hello.encode("h"))) == hello
    assert PeerWelcome.parse(parse_head(welcome.encode())) == welcome


@given(requests())
def test_the_standard_library_reads_our_heads_alike(request: PeerRequest) -> None:
    raw = with_mac(request.encode("127.0.0.1:80"), KEY)
    first, _, rest = raw.partition(b"\r\n")
    theirs = http.client.parse_headers(io.BytesIO(rest))
    ours = parse_head(raw[:-4] + b"\r\n")
    assert dict(theirs) == dict(ours.fields)
    assert first.decode().split(" ") == list(ours.start)


@given(requests(), st.data())
def test_a_head_with_one_byte_changed_is_another_request_or_none(
    request: PeerRequest, data: st.DataObject
) -> None:
    head = bytearray(request.encode("host"))
    head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = PeerRequest.parse(parse_head(bytes(head)))
    except MalformedError:
        return
    assert found.encode("host") == head or b"host: host\r\n" not in head


@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_or_malformed(raw: bytes) -> None:
    try:
        PeerRequest.parse(parse_head(raw))
    except MalformedError:
        return


PUT = f"PUT /o/a HTTP/1.1\r\nhost: h\r\nckpt-boot: {BOOT}\r\nckpt-epoch: 1\r\nckpt-counter: 2\r\ncontent-length: 20\r\n"


def test_the_sample_is_right_before_it_is_spoiled() -> None:
    found = PeerRequest.parse(parse_head(PUT.encode()))
    assert found == PeerRequest(verb="PUT", key="a", boot=BOOT, epoch=1, counter=2, body_bytes=4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("PUT", "put"),
        ("PUT", "POST"),
        ("PUT", "GET"),
        ("PUT ", "PUT  "),
        ("HTTP/1.1", "HTTP/1.0"),
        ("/o/a", "/x/a"),
        ("/o/a", "/o/"),
        ("/o/a", "/o/../a"),
        ("/o/a", "/o/%61"),
        ("/o/a", "/o/%e9"),
        ("/o/a", "/o/a%"),
        ("/o/a", "http://h/o/a"),
        ("/o/a", "/o/a?b=c"),
        ("/o/a", "/o/.tmp/a"),
        ("host: h\r\n", ""),
        ("host: h", "Host: h"),
        ("host: h", "host:h"),
        ("host: h", "host: h "),
        ("host: h", "host : h"),
        ("host: h", "host: h\r\n folded"),
        ("host: h", "host: \x00"),
        ("host: h", "host: é"),
        ("host: h", "host: "),
        ("host: h", "host: h\nckpt-x: y"),
        ("host: h", "host: h\rckpt-x: y"),
        ("host: h", "host: h\r\ncontent-length: 20"),
        ("host: h", "host: h\r\nhost: h"),
        ("host: h", "host: h\r\ntransfer-encoding: chunked"),
        ("host: h", "host: h\r\nrange: bytes=0-1"),
        (": 20", ": +20"),
        (": 20", ": 020"),
        (": 20", ": 2e1"),
        (": 20", ": -20"),
        (": 20", ": 15"),
        (": 20", f": {10**18}"),
        (": 20", ": 20, 20"),
        (": 20", ": ٢٠"),
        ("ckpt-epoch: 1", "ckpt-epoch: 1.0"),
        ("ckpt-epoch: 1\r\n", ""),
        ("ckpt-counter: 2\r\n", ""),
        (BOOT, BOOT[:-1]),
        (BOOT, BOOT.upper()),
        ("content-length: 20\r\n", ""),
        ("content-length: 20", "expect: 100-continue"),
        ("host: h", "host: h\r\nexpect: 200-ok"),
        ("host: h", "host: h\r\nif-none-match: x"),
    ],
)
def test_another_spelling_is_malformed(old: str, new: str) -> None:
    spoiled = PUT.replace(old, new, 1).encode()
    assert spoiled != PUT.encode()
    with pytest.raises(MalformedError):
        PeerRequest.parse(parse_head(spoiled))


BASED = PUT + "ckpt-base: /o/b\r\nckpt-base-version: 3\r\nckpt-size: 30\r\nckpt-ranges: 0\r\n"


def test_a_base_is_read_with_all_that_belongs_to_it() -> None:
    found = PeerRequest.parse(parse_head(BASED.encode()))
    assert found.base == DeltaBase(key="b", version=3, size_bytes=30, ranges=0)
    assert (found.body_bytes, found.object_bytes) == (4, 30)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ckpt-base: /o/b\r\n", ""),
        ("ckpt-base-version: 3\r\n", ""),
        ("ckpt-size: 30\r\n", ""),
        ("ckpt-ranges: 0\r\n", ""),
        ("/o/b", "b"),
        ("/o/b", "/o/"),
        ("/o/b", "/o/%62"),
        ("/o/b", "/o/../b"),
        ("version: 3", "version: 03"),
        ("size: 30", "size: 3"),
        ("ranges: 0", "ranges: 1"),
        ("ranges: 0", "ranges: -1"),
        ("PUT", "GET"),
        ("PUT", "DELETE"),
        ("PUT", "HEAD"),
    ],
)
def test_a_base_in_another_spelling_or_in_parts_is_malformed(old: str, new: str) -> None:
    spoiled = BASED.replace(old, new, 1).encode()
    assert spoiled != BASED.encode()
    with pytest.raises(MalformedError):
        PeerRequest.parse(parse_head(spoiled))


@pytest.mark.parametrize(
    "span",
    [
        "bytes=1-0",
        "bytes=-5",
        "bytes=5-",
        "bytes=0-1,3-4",
        "lines=0-1",
        "bytes=0-1000000000000000000",
    ],
)
def test_a_range_has_one_form(span: str) -> None:
    with pytest.raises(MalformedError):
        PeerRequest.parse(
            parse_head(
                PUT.replace("PUT", "GET").replace("content-length: 20", f"range: {span}").encode()
            )
        )


def test_a_head_has_bounds() -> None:
    many = {f"a-{i}": "x" for i in range(FIELDS_MAX)}
    assert len(parse_head(encode_head("GET / HTTP/1.1", many)).fields) == FIELDS_MAX
    with pytest.raises(MalformedError, match="too many fields"):
        parse_head(encode_head("GET / HTTP/1.1", {**many, "b": "x"}))
    with pytest.raises(MalformedError, match="too long"):
        parse_head(encode_head("GET / HTTP/1.1", {"a": "x" * HEAD_BYTES_MAX}))


def test_every_key_fits_a_head() -> None:
    for key in ("\U0001f600" * 63 + "/" + "\U0001f600" * 63, "é/" * 128 + "é" * 60):
        assert is_key(key)
        put = PeerRequest(verb="PUT", key=key, boot=BOOT, epoch=1, counter=1, body_bytes=1)
        assert len(with_mac(put.encode("h"), KEY)) < HEAD_BYTES_MAX // 2
        base = DeltaBase(key=key, version=1, size_bytes=1, ranges=0)
        assert len(with_mac(replace(put, base=base).encode("h"), KEY)) < HEAD_BYTES_MAX // 2


def test_a_mac_is_taken_only_from_the_last_line() -> None:
    head = b"GET / HTTP/1.1\r\na: b\r\n"
    proof = mac(KEY, head)
    assert split_mac(with_mac(head, proof)) == (head, proof)
    for raw in (
        unsigned(head),
        with_mac(head, proof)[:-1],
        with_mac(head, proof)[1:-4] + b"c: d\r\n\r\n",
        with_mac(head, proof).replace(b"ckpt-mac", b"ckpt-MAC"),
        with_mac(head, proof).replace(b"ckpt-mac: ", b"ckpt-mac:  "),
        head + b"ckpt-mac: " + proof.hex().upper().encode() + b"\r\n\r\n",
        b"",
    ):
        assert split_mac(raw) is None, raw


def test_a_reason_in_words_never_breaks_a_head() -> None:
    for why in ("a\r\nb: c", "é\0", "", " ", "x" * 9999, "\r\n\r\n"):
        answer = PeerAnswer(status=400, boot=BOOT, epoch=0, counter=0, why=why or "-")
        assert PeerAnswer.parse(parse_head(answer.encode())).status == 400
        assert parse_head(unsigned_refusal(400, why)).fields["content-length"] == "0"
