"""Copies of a model in memory, and which of them answers which request.

A *generation* is the model as one snapshot has it. It lies in a buffer, a whole copy of the model
of its own, so a request that pinned a generation computes with that generation alone, however long
it takes and whatever is swapped meanwhile. A buffer is filled only while no request and no
generation that is kept for rollback is in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch

from ckpt.capture.tensors import local_of
from ckpt.errors import NotFoundError, UnavailableError
from ckpt.restore.plan import Want
from ckpt.serve.delta import HeldBytes, Place
from ckpt.values import Digest, SnapshotInfo


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """The model as one snapshot has it. ``model`` must not be trained or changed."""

    model: torch.nn.Module
    info: SnapshotInfo

    @property
    def id(self) -> str:
        """What replies carry: ``EPOCH-STEP`` of the snapshot."""
        return f"{self.info.epoch}-{self.info.step}"

    @property
    def step(self) -> int:
        """The training step that the snapshot was captured at."""
        return self.info.step


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTensor:
    """A filled tensor whose memory is not read back: its chunks, and torch's version of it then."""

    tensor: torch.Tensor
    chunks: frozenset[tuple[Place, Digest]]
    version: int | None

    @classmethod
    def now(cls, tensor: torch.Tensor, chunks: frozenset[tuple[Place, Digest]]) -> DeviceTensor:
        """The tensor as it was just filled. Inference tensors have no version: never unchanged."""
        local = local_of(tensor)
        return cls(tensor, chunks, None if local.is_inference() else local._version)

    @property
    def unchanged(self) -> bool:
        """Whether torch wrote nothing to it since."""
        return self.version is not None and local_of(self.tensor)._version == self.version


@dataclass(slots=True, eq=False)
class ModelBuffer:
    """One copy of the model: what its bytes are, which generation is in it, who computes with it.

    ``held`` says what the bytes in ``memory`` are, ``on_device`` what the other tensors are.
    ``generation`` is None while it is filled.
    """

    model: torch.nn.Module
    held: dict[Place, HeldBytes] = field(default_factory=dict)
    memory: dict[Want, memoryview] = field(default_factory=dict)
    on_device: dict[Want, DeviceTensor] = field(default_factory=dict)
    generation: Generation | None = None
    pins: int = 0

    def forget(self) -> None:
        """Take nothing that is in the memory for known: the next fill writes all of it."""
        self.held = {}
        self.on_device = {}


class PinnedGeneration:
    """A generation for one request: ``with follower.generation() as g``. Costs a microsecond."""

    __slots__ = ("_buffer", "_generation_id", "_generations")

    def __init__(self, generations: Generations, generation_id: str | None = None) -> None:
        self._generations = generations
        self._generation_id = generation_id
        self._buffer: ModelBuffer | None = None

    def __enter__(self) -> Generation:
        self._buffer, generation = self._generations.pin(self._generation_id)
        return generation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "it was entered"
        self._generations.unpin(buffer)


class Generations:
    """The buffers of one model. Thread-safe. ``keep``: how many generations can be served at once,
    the served one included; there is at least one buffer more."""

    def __init__(self, buffers: Sequence[ModelBuffer], *, keep: int) -> None:
        assert len(buffers) > keep, "one buffer to fill beside those that are kept"
        self._buffers = tuple(buffers)
        self._keep = keep
        self._kept: list[ModelBuffer] = []
        self._served: ModelBuffer | None = None
        self._changed = threading.Condition()
        self._closed = False

    def pin(self, generation_id: str | None = None) -> tuple[ModelBuffer, Generation]:
        """The served generation, or the one named if it is kept; it stays as it is until ``unpin``.

        Raises UnavailableError if none is served yet, and NotFoundError that lists what is kept.
        """
        with self._changed:
            if self._served is None:
                raise UnavailableError(
                    "no generation is served yet; wait for the first with follower.wait()"
                )
            for buffer in (self._served, *self._kept):
                generation = buffer.generation
                if generation is not None and generation_id in (None, generation.id):
                    buffer.pins += 1
                    return buffer, generation
            kept = [buffer.generation.id for buffer in self._kept if buffer.generation is not None]
            raise NotFoundError(
                f"that generation is not in memory. generation={generation_id} kept={kept}; take "
                "one of these, or none for the served one"
            )

    def unpin(self, buffer: ModelBuffer) -> None:
        """A request is over."""
        with self._changed:
            buffer.pins -= 1
            if not buffer.pins:
                self._changed.notify_all()

    def buffer_to_fill(self, *, on_wait: Callable[[Generation], None]) -> ModelBuffer | None:
        """A buffer that nothing reads and that is not kept, with its generation forgotten.

        Waits for requests that still compute with the oldest one; ``on_wait`` is called once if it
        must. None if closed meanwhile.
        """
        told = False
        with self._changed:
            while not self._closed:
                free = [buffer for buffer in self._buffers if buffer not in self._kept]
                for buffer in free:
                    if not buffer.pins:
                        buffer.generation = None
                        return buffer
                if not told and free[0].generation is not None:
                    told = True
                    on_wait(free[0].generation)
                self._changed.wait(1.0)
        return None

    def donors(self, target: ModelBuffer) -> list[ModelBuffer]:
        """The buffers whose bytes may be copied into ``target``: those that hold a generation, the
        served one first."""
        with self._changed:
            others = [
                buffer
                for buffer in self._buffers
                if buffer is not target and buffer.generation is not None
            ]
            return sorted(others, key=lambda buffer: buffer is not self._served)

    def serve(self, buffer: ModelBuffer, generation: Generation) -> None:
        """From now on new requests get ``generation``, which is in ``buffer``. One assignment."""
        with self._changed:
            buffer.generation = generation
            self._kept = [buffer, *(kept for kept in self._kept if kept is not buffer)][
                : self._keep
            ]
            self._served = buffer
            self._changed.notify_all()

    def serve_kept(self, generation_id: str | None) -> Generation:
        """Serve a generation that is kept: the one named, or the one before the served one.

        Raises NotFoundError that lists what is kept.
        """
        with self._changed:
            others = [kept for kept in self._kept if kept is not self._served]
            for buffer in others:
                generation = buffer.generation
                if generation is not None and generation_id in (None, generation.id):
                    # What is rolled back from goes to the end: the next fill takes its buffer.
                    if self._served is not None:
                        self._kept.remove(self._served)
                        self._kept.append(self._served)
                    self._served = buffer
                    self._changed.notify_all()
                    return generation
            kept = [buffer.generation.id for buffer in others if buffer.generation is not None]
            raise NotFoundError(
                f"that generation is not in memory. generation={generation_id} kept={kept}; name "
                "one of these, or its step with follower.follow()"
            )

    @property
    def served(self) -> Generation | None:
        """The generation that new requests get."""
        with self._changed:
            return self._served.generation if self._served is not None else None

    @property
    def kept(self) -> tuple[Generation, ...]:
        """All generations that can be served at once, the newest swap first."""
        with self._changed:
            return tuple(kept.generation for kept in self._kept if kept.generation is not None)

    def wait(self, reached: Callable[[Generation], bool], timeout_s: float | None) -> Generation:
        """Wait until the served generation is one that ``reached`` accepts. Raises
        UnavailableError after ``timeout_s`` or if closed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                generation = self._served.generation if self._served is not None else None
                if generation is not None and reached(generation):
                    return generation
                left = None if deadline is None else deadline - time.monotonic()
                if self._closed or (left is not None and left <= 0):
                    raise UnavailableError(
                        f"the generation was not served in time. served="
                        f"{generation.id if generation else None} timeout_s={timeout_s}"
                    )
                self._changed.wait(left)

    def close(self) -> None:
        """Wake all who wait. What is pinned stays usable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
