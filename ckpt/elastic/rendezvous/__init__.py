"""The entry point of ``--rdzv-backend=ckpt``.

Every torchrun on this machine loads this module, also for other backends, so it imports nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The function that makes handlers, as entry points of ``torchrun.handlers`` provide it."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """The handler for one agent. Raises UsageError (a ValueError) if the options cannot work."""
    # Loaded here only: torch calls ``handler`` while it is itself being imported.
    made: RendezvousHandler = importlib.import_module("ckpt.elastic.rendezvous.plugin").handler_of(
        parameters
    )
    return made
