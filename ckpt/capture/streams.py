"""The random number generators of this process as one tracked object."""

from __future__ import annotations

import random

import numpy as np
import torch

from ckpt.errors import UsageError

_PYTHON_WORDS = 625


class RngState:
    """The global generators of torch (CPU, and every CUDA device once CUDA is in use), numpy and ``random``.

    Track it as an item of its own: ``{"rng": RngState()}``. It belongs to its rank. CUDA is never initialised by it: states
    of CUDA devices that are restored before CUDA is in use are applied when it starts.
    """

    def state_dict(self) -> dict[str, object]:
        """All states as plain values, about 10 KB plus 16 bytes a CUDA device. Draws nothing."""
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        state: dict[str, object] = {
            "torch": torch.get_rng_state().numpy().tobytes(),
            "numpy": (str(name), np.asarray(keys).copy(), int(position), int(has_gauss), float(cached)),
            "python": (version, np.array(words, dtype=np.uint32), gauss),
        }
        if _cuda_in_use():
            state["cuda"] = [one.numpy().tobytes() for one in torch.cuda.get_rng_state_all()]
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Put all states back. Raises UsageError for what ``state_dict`` can't have made."""
        match state:
            case {"torch": bytes(cpu), "numpy": tuple(numpy_state), "python": (version, np.ndarray() as words, gauss)}:
                if len(words) != _PYTHON_WORDS:
                    raise UsageError(
                        f"not the state of a Python generator. words={len(words)} expected={_PYTHON_WORDS}"
                    )
                torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
                np.random.set_state(numpy_state)
                random.setstate((version, tuple(words.tolist()), gauss))
            case _:
                raise UsageError(f"not the state of this process's generators. keys={sorted(state)}")
        match state:
            case {"cuda": list(devices)} if torch.version.cuda or torch.version.hip:
                for index, one in enumerate(devices):
                    known = torch.cuda.device_count() if _cuda_in_use() else len(devices)
                    if index < known:
                        torch.cuda.set_rng_state(torch.frombuffer(bytearray(one), dtype=torch.uint8), index)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
