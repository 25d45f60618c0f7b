"""One connection of a server: the hello, then requests in order. Runs in a thread of its own and ends with the connection."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from ckpt.cluster.peermem.admit import Kind, Refusal, admit, fenced
from ckpt.cluster.peermem.auth import NONCE_BYTES, Secret, SessionKeys, mac, same
from ckpt.cluster.peermem.body_mac import BodyMac, body_mac
from ckpt.cluster.peermem.changed import BaseGoneError, between, read_ranges
from ckpt.cluster.peermem.channel import Channel
from ckpt.cluster.peermem.fence import Fence
from ckpt.cluster.peermem.http import CONTINUE, Answer, Hello, Request, Welcome, micros, refusal_unsigned
from ckpt.cluster.peermem.memory import copy_bytes
from ckpt.cluster.peermem.shelf import Shelf
from ckpt.cluster.peermem.sources import Held, always
from ckpt.cluster.peermem.tally import Tally
from ckpt.cluster.peermem.vault import TooLargeError
from ckpt.cluster.peermem.wire import TAG_BYTES, MalformedError, parse_head, split_mac, unsigned, with_mac
from ckpt.errors import FencedError, KeyExistsError, NotFoundError, StoreFullError, UsageError

EAGER_BYTES_MAX = 64 << 10
"""Bodies up to this may come without being asked for; they are taken in and dropped where the request is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What all connections of one server share."""

    shelf: Shelf
    secret: Secret
    fence: Fence
    tally: Tally
    boot: str
    macs: tuple[str, ...]
    idle_s: float


@dataclass(frozen=True, slots=True)
class _Session:
    keys: SessionKeys
    mac: str


class Serving:
    """Serves one channel until it ends. ``proven`` is asked at the first request of a holder of the secret whether there is a
    place for it; ``rests`` is told when one begins to ask nothing, and when that is over.
    """

    def __init__(
        self, desk: Desk, channel: Channel, *, proven: Callable[[], bool], rests: Callable[[bool], object]
    ) -> None:
        self._desk = desk
        self._channel = channel
        self._proven = proven
        self._rests = rests
        self._last = 0
        self._owed_bytes = 0  # of a body that comes unasked and was not taken in
        self._met = False

    def run(self) -> None:
        """Serve. Returns when the connection is over, whoever ended it; raises OSError and EndedError where it broke."""
        try:
            session = self._meet()
            while session is not None and self._serve_next(session):
                continue
        except TimeoutError:
            self._desk.tally.refuse("slow")

    def _meet(self) -> _Session | None:
        """Hear the hello and answer it; None where there was none that is right."""
        desk = self._desk
        raw = self._head(None)
        if raw is None:
            return None
        split = split_mac(raw)
        if split is None or not same(split[1], desk.secret.hello_mac(split[0])):
            self._turn_away(401, "mac", "no hello of a holder of this job's secret")
            return None
        try:
            hello = Hello.of(parse_head(split[0]))
        except MalformedError as error:
            self._turn_away(400, "malformed", str(error))
            return None
        name = next((one for one in desk.macs if one in hello.macs), None)
        if name is None:
            self._turn_away(400, "malformed", f"no body MAC in common. known={','.join(desk.macs)}")
            return None
        head = Welcome(os.urandom(NONCE_BYTES).hex(), desk.boot, desk.fence.epoch, name).spell()
        proof = desk.secret.welcome_mac(split[1], head)
        self._channel.write(with_mac(head, proof))
        return _Session(desk.secret.session(split[1], proof), name)

    def _serve_next(self, session: _Session) -> bool:
        """Answer one request; whether another may follow."""
        self._rests(True)
        raw = self._head(self._desk.idle_s if self._met else None)
        self._rests(False)
        if raw is None:
            return False
        split = split_mac(raw)
        if split is None or not same(split[1], mac(session.keys.request_head, split[0])):
            self._turn_away(401, "mac", "not from who began this connection")
            return False
        place = self._met or self._proven()
        self._met = True
        try:
            request = Request.of(parse_head(split[0]))
        except MalformedError as error:
            return self._refuse(session, 0, Refusal(400, "malformed", str(error)), over=True)
        if not place:
            return self._refuse(session, request.counter, Refusal(503, "crowded", "all places are taken"), over=True)
        self._owed_bytes = 0 if request.body_bytes is None or request.waits else request.body_bytes + TAG_BYTES
        refusal = admit(request, boot=self._desk.boot, epoch=self._desk.fence.epoch, last_counter=self._last)
        if refusal is not None and refusal.kind == "replay":
            return self._refuse(session, 0, refusal, over=True)
        self._last = request.counter
        if refusal is None:
            self._desk.fence.see(request.epoch)
            refusal = self._why_not(request)
        return self._act(session, request, split[1]) if refusal is None else self._refuse(session, self._last, refusal)

    def _why_not(self, request: Request) -> Refusal | None:
        """What can be refused before any byte of a body is taken in."""
        shelf = self._desk.shelf
        if request.verb in ("PUT", "DELETE") and shelf.read_only(request.key):
            return Refusal(403, "read-only", "objects below this prefix are only read")
        if request.create_only and shelf.vault.stat(request.key) is not None:
            return Refusal(412, "taken", "the key is taken")
        if self._owed_bytes > EAGER_BYTES_MAX + TAG_BYTES:
            return Refusal(400, "malformed", f"so long a body is announced first. limit_bytes={EAGER_BYTES_MAX}")
        return None

    def _act(self, session: _Session, request: Request, head_mac: bytes) -> bool:
        """Do what is asked, answer, and say whether another request may follow."""
        desk, facts = self._desk, None
        try:
            match request.verb:
                case "PUT":
                    return self._put(session, request, head_mac)
                case "GET":
                    with desk.shelf.reading(request.key) as held:
                        return self._get(session, request, held)
                case "LIST":
                    return self._list(session, request)
                case "DELETE":
                    with desk.fence.holding(request.epoch):
                        desk.shelf.vault.delete(request.key)
                    self._answer(session, self._facts(204))
                case "HEAD":
                    with desk.shelf.reading(request.key) as held:
                        facts = self._facts(200, held)
                    self._answer(session, facts)
        except BaseGoneError as error:
            return self._refuse(session, self._last, Refusal(424, "base", str(error)))
        except NotFoundError:
            return self._refuse(session, self._last, Refusal(404, "missing", "no such object"))
        except UsageError as error:
            return self._refuse(session, self._last, Refusal(400, "malformed", str(error)))
        except TooLargeError as error:
            return self._refuse(session, self._last, Refusal(413, "too-large", str(error)))
        except StoreFullError as error:
            return self._refuse(session, self._last, Refusal(507, "full", str(error)))
        except KeyExistsError as error:
            return self._refuse(session, self._last, Refusal(412, "taken", str(error)))
        except FencedError:
            return self._refuse(session, self._last, fenced(request.epoch, desk.fence.epoch))
        desk.tally.serve(request.verb)
        return True

    def _put(self, session: _Session, request: Request, head_mac: bytes) -> bool:
        vault, refusal = self._desk.shelf.vault, Refusal(401, "body", "the body is not what its tag proves")
        proven = False
        with self._base(request) as base, vault.incoming(request.key, request.object_bytes) as incoming:
            if request.waits:
                self._channel.write(CONTINUE)
            self._owed_bytes = 0
            proof = body_mac(session.mac, session.keys.request_body, counter=request.counter, head_mac=head_mac)
            try:
                proven = self._take_in(request, incoming.view, base, proof)
            except MalformedError as error:
                refusal = Refusal(400, "malformed", str(error))
            if proven:
                with self._desk.fence.holding(request.epoch):  # one may have opened while the bytes came
                    version = incoming.publish(create_only=request.create_only)
        if not proven:
            return self._refuse(session, request.counter, refusal, over=True)
        self._answer(session, dataclasses.replace(self._facts(201), size_bytes=request.object_bytes, version=version))
        self._desk.tally.serve("PUT", received_bytes=request.body_bytes or 0)
        return True

    @contextlib.contextmanager
    def _base(self, request: Request) -> Iterator[memoryview | None]:
        """The base that a PUT refers to, pinned until the end. Raises BaseGoneError where it is not that one any more."""
        base = request.base
        if base is None:
            yield None
            return
        with contextlib.ExitStack() as pinned:
            try:
                held = pinned.enter_context(self._desk.shelf.vault.reading(base.key))
            except NotFoundError:
                raise BaseGoneError(f"the base is gone. key={base.key}") from None
            found = held.version, len(held.view)
            if found != (base.version, base.size_bytes):
                raise BaseGoneError(f"the base is another one. key={base.key} version={found[0]} size_bytes={found[1]}")
            yield held.view

    def _take_in(self, request: Request, out: memoryview, base: memoryview | None, proof: BodyMac) -> bool:
        """Fill an object's memory with a body, and with what it leaves to the base; whether its tag proves it.

        Raises MalformedError for a table that is none, before anything is copied.
        """
        if base is None or request.base is None:
            return self._channel.read_body(out, proof)
        table = bytearray(request.base.table_bytes)
        self._channel.read_part(memoryview(table), proof)
        sent_bytes = (request.body_bytes or 0) - len(table)
        ranges = read_ranges(table, size_bytes=len(out), sent_bytes=sent_bytes)
        for (kept, kept_bytes), (offset, length) in between(ranges, size_bytes=len(out)):
            began_s = time.monotonic()
            copy_bytes(out[kept : kept + kept_bytes], base[kept : kept + kept_bytes])
            self._channel.excuse(time.monotonic() - began_s)
            self._channel.read_part(out[offset : offset + length], proof)
        return self._channel.proven(proof)

    def _get(self, session: _Session, request: Request, held: Held) -> bool:
        offset, size = request.span or (0, len(held.view))
        if offset + size > len(held.view):
            refusal = Refusal(416, "range", f"the object ends before. size_bytes={len(held.view)}")
            return self._refuse(session, request.counter, refusal)
        answer = dataclasses.replace(self._facts(206, held), body_bytes=size)
        part = held.view[offset : offset + size]
        extent = None if held.fd is None else (held.fd, held.offset_bytes + offset)
        if not self._answer(session, answer, part, extent, held.unchanged):
            return False
        self._desk.tally.serve("GET", sent_bytes=size)
        return True

    def _list(self, session: _Session, request: Request) -> bool:
        entries, more = self._desk.shelf.page(request.key, request.after)
        body = msgspec.json.encode([(one.key, one.size_bytes, micros(one.modified_unix_s)) for one in entries])
        answer = dataclasses.replace(self._facts(200), body_bytes=len(body), more=more)
        self._answer(session, answer, memoryview(body))
        self._desk.tally.serve("LIST", sent_bytes=len(body))
        return True

    # Words.

    def _head(self, idle_s: float | None) -> bytes | None:
        try:
            return self._channel.read_head(idle_s=idle_s)
        except MalformedError as error:
            self._turn_away(400, "malformed", str(error))
            return None

    def _facts(self, status: int, held: Held | None = None) -> Answer:
        desk = self._desk
        if held is None:
            return Answer(status=status, boot=desk.boot, epoch=desk.fence.epoch, counter=self._last)
        return Answer(
            status=status, boot=desk.boot, epoch=desk.fence.epoch, counter=self._last, size_bytes=len(held.view),
            version=held.version, modified_us=micros(held.modified_unix_s),
        )  # fmt: skip

    def _answer(
        self, session: _Session, answer: Answer, body: memoryview | None = None,
        extent: tuple[int, int] | None = None, unchanged: Callable[[], bool] = always,
    ) -> bool:  # fmt: skip
        """Send an answer; False where the body changed meanwhile, so that its tag was not sent."""
        head = answer.spell()
        head_mac = mac(session.keys.answer_head, head)
        if body is None:
            self._channel.write(with_mac(head, head_mac))
            return True
        proof = body_mac(session.mac, session.keys.answer_body, counter=answer.counter, head_mac=head_mac)
        if len(body) <= EAGER_BYTES_MAX:
            proof.update(body)
            if not unchanged():
                return False
            self._channel.write(with_mac(head, head_mac), body, proof.tag())
            return True
        self._channel.write(with_mac(head, head_mac))
        if extent is None:
            self._channel.write_body([body], proof)
        else:
            self._channel.write_extent(body, *extent, proof)
        if not unchanged():
            return False
        self._channel.write(proof.tag())
        return True

    def _refuse(self, session: _Session, counter: int, refusal: Refusal, *, over: bool = False) -> bool:
        """Say no; whether another request may follow. A small body that came along is taken in and dropped."""
        self._desk.tally.refuse(refusal.kind)
        if not over and 0 < self._owed_bytes <= EAGER_BYTES_MAX + TAG_BYTES:
            self._channel.skip(self._owed_bytes)
            self._owed_bytes = 0
        over = over or self._owed_bytes > 0
        self._answer(session, dataclasses.replace(self._facts(refusal.status), counter=counter, why=refusal.why))
        if over:
            self._channel.linger()
        return not over

    def _turn_away(self, status: int, kind: Kind, why: str) -> None:
        """End a connection with somebody who has shown nothing."""
        self._desk.tally.refuse(kind)
        self._channel.write(unsigned(refusal_unsigned(status, why)))
        self._channel.linger()
