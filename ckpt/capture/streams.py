"""The process's random number generators as one tracked object, and torchdata's resumable
loaders.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeGuard

import numpy as np
import torch

from ckpt.errors import UsageError

_PYTHON_WORDS = 625


class RngState:
    """The global generators of torch (CPU, and every CUDA device once CUDA is in use), numpy and
    ``random``.

    Track it as an item of its own: ``{"rng": RngState()}``. Each rank has its own. It never
    initialises CUDA: states of CUDA devices that are restored before CUDA is in use are applied
    when it starts.
    """

    def state_dict(self) -> dict[str, object]:
        """All states as plain values, about 10 KB plus 16 bytes a CUDA device. Draws nothing."""
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        state: dict[str, object] = {
            "torch": torch.get_rng_state().numpy().tobytes(),
            "numpy": (
                str(name),
                np.asarray(keys).copy(),
                int(position),
                int(has_gauss),
                float(cached),
            ),
            "python": (version, np.array(words, dtype=np.uint32), gauss),
        }
        if _cuda_in_use():
            state["cuda"] = [
                device_state.numpy().tobytes() for device_state in torch.cuda.get_rng_state_all()
            ]
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore all states. Raises UsageError for what ``state_dict`` can't have made."""
        match state:
            case {
                "torch": bytes(cpu),
                "numpy": tuple(numpy_state),
                "python": (version, np.ndarray() as words, gauss),
            }:
                if len(words) != _PYTHON_WORDS:
                    raise UsageError(
                        f"not the state of a Python generator. words={len(words)} "
                        f"expected={_PYTHON_WORDS}"
                    )
                torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
                np.random.set_state(numpy_state)
                random.setstate((version, tuple(words.tolist()), gauss))
            case _:
                raise UsageError(
                    f"not the state of this process's generators. keys={sorted(state)}"
                )
        match state:
            case {"cuda": list(devices)} if torch.version.cuda or torch.version.hip:
                for index, device_state in enumerate(devices):
                    devices_known = torch.cuda.device_count() if _cuda_in_use() else len(devices)
                    if index < devices_known:
                        torch.cuda.set_rng_state(
                            torch.frombuffer(bytearray(device_state), dtype=torch.uint8), index
                        )


def generators_alike(states: Sequence[object]) -> frozenset[str]:
    """Which entries of ``RngState``'s states say that all (several) ranks drew alike with that
    generator; empty for one state alone.

    Of CUDA generators only that of each rank's own device counts, the one that drew most: others
    have the seed alone, and the own device's number differs between the ranks of one machine.
    """
    if len(states) < 2:
        return frozenset()
    first, *others = [_marks(state) for state in states]
    return frozenset(
        kind for kind, mark in first.items() if all(one.get(kind) == mark for one in others)
    )


def _marks(state: object) -> dict[str, object]:
    """Equal for generators that draw alike, by entry."""
    marks: dict[str, object] = {}
    match state:
        case {"torch": bytes(cpu)}:
            marks["torch"] = cpu
    match state:
        case {"numpy": (str(name), np.ndarray() as keys, *rest)}:
            marks["numpy"] = (name, keys.tobytes(), *rest)
    match state:
        case {"python": (version, np.ndarray() as words, gauss)}:
            marks["python"] = (version, words.tobytes(), gauss)
    match state:
        case {"cuda": [_, *_] as devices}:
            marks["cuda"] = _own_device(devices)
    return marks


def _own_device(devices: Sequence[bytes]) -> bytes:
    """The state of the CUDA generator that drew most: 8 bytes of seed, then how many it drew."""
    return max(map(bytes, devices), key=lambda one: int.from_bytes(one[8:16], "little"))


def state_of_new_rank(
    state: Mapping[str, object], *, salt: bytes, alike: Collection[str] = ()
) -> dict[str, object]:
    """What ``RngState`` made, folded with ``salt``: generators that draw other numbers than the old
    rank does whose state it was. Those that ``alike`` names (see ``generators_alike``) are kept,
    and every CUDA device gets the state of the old rank's own.

    Equal states and salts give equal results, so ranks that drew alike still do.
    """

    def seed(kind: str, *parts: bytes) -> bytes:
        return hashlib.blake2b(
            b"".join(parts), digest_size=32, key=salt, person=kind.encode()
        ).digest()

    match state:
        case {
            "torch": bytes(cpu),
            "numpy": (str(name), np.ndarray() as keys, int(position), *_),
            "python": (version, np.ndarray() as words, _),
        }:
            pass
        case _:
            raise UsageError(f"not the state of this process's generators. keys={sorted(state)}")
    torch_number = int.from_bytes(seed("torch", cpu)[:8], "little", signed=True)
    numpy_seed = seed("numpy", keys.tobytes(), str(position).encode())
    python_seed = int.from_bytes(seed("python", words.tobytes()), "little")
    drawn_by_numpy = np.random.RandomState(np.frombuffer(numpy_seed, dtype=np.uint32))
    _, new_keys, new_position, *_ = drawn_by_numpy.get_state(legacy=True)
    python_words = random.Random(python_seed).getstate()[1]
    folded: dict[str, object] = {
        **state,
        "torch": torch.Generator().manual_seed(torch_number).get_state().numpy().tobytes(),
        "numpy": (name, np.asarray(new_keys).copy(), int(new_position), 0, 0.0),
        "python": (version, np.array(python_words, dtype=np.uint32), None),
    }
    match state:
        case {"cuda": list(devices)}:
            # A CUDA generator's state is its seed and how many numbers were drawn. All of a rank's
            # devices are folded at once: which of them it uses may differ from the old rank's.
            number = seed("cuda", *(bytes(one) for one in devices))[:8]
            folded["cuda"] = [number + bytes(len(one) - len(number)) for one in devices]
            if "cuda" in alike:
                folded["cuda"] = [_own_device(devices)] * len(devices)
    kept = {kind: state[kind] for kind in alike if kind != "cuda"}
    return {**folded, **kept}


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


# ---- loaders: torchdata's ``StatefulDataLoader`` is recognised by name, so that torchdata is never
# imported

UNOPENED_KEY = "unopened_sampler_generator"
"""The only key in the state of a loader that was never iterated: its sampler's generator state, or
None.
"""


class ResumableLoader(Protocol):
    """What is used of a loader."""

    sampler: object
    next_iter_state: dict[str, object] | None

    def state_dict(self) -> dict[str, object]:
        """Its position; opens the loader if need be."""
        ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Continue at a position at the next ``iter``."""
        ...


def is_loader(value: object) -> TypeGuard[ResumableLoader]:
    """Whether it is torchdata's loader."""
    return any(
        base.__name__ == "StatefulDataLoader" and base.__module__.startswith("torchdata.")
        for base in type(value).__mro__
    )


def loader_state(loader: ResumableLoader) -> dict[str, object]:
    """The loader's position. A loader that was never iterated is not opened for it: that would draw
    random numbers.
    """
    if getattr(loader, "_iterator", None) is not None:
        return loader.state_dict()
    if loader.next_iter_state is not None:
        return loader.next_iter_state
    generator = getattr(loader.sampler, "generator", None)
    return {
        UNOPENED_KEY: generator.get_state().numpy().tobytes()
        if isinstance(generator, torch.Generator)
        else None
    }


def is_iterated(loader: ResumableLoader) -> bool:
    """Whether an iterator is in the middle of an epoch: it would keep its old position, whatever is
    loaded.
    """
    iterator = getattr(loader, "_iterator", None)
    return not (
        iterator is None
        or iterator._finished
        or getattr(loader, "_initial_iter_for_state_dict", False)
    )


def restore_loader(loader: ResumableLoader, state: Mapping[str, object]) -> None:
    """Restore what ``loader_state`` gave."""
    if UNOPENED_KEY not in state:
        loader.load_state_dict(dict(state))
        return
    loader.load_state_dict({})
    loader.next_iter_state = None
    generator = getattr(loader.sampler, "generator", None)
    match state[UNOPENED_KEY], generator:
        case bytes(data), torch.Generator():
            generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        case None, None:
            pass
        case _:
            raise UsageError(
                f"loader shuffles differently now. sampler={type(loader.sampler).__qualname__}; "
                "make it as it was"
            )
