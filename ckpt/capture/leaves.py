"""What a capture is: live tensors and encoded objects, each with the leaf that records it, and how
leaves are named.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ckpt.values import Box, Leaf


@dataclass(frozen=True, slots=True)
class World:
    """This process's rank and the number of ranks, as the captured state sees them."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorLeaf:
    """One tensor as it is now. No copy was made, so its bytes change as soon as training continues.

    ``tensor`` is this rank's local memory, detached (any device, any strides; conjugate and
    negative views are resolved). ``box`` is its region of the global tensor, in elements.
    ``replicas`` are the global ranks that hold exactly this box, ascending, this rank among them.
    ``leaf.rank`` is None for a tensor that all ranks share.
    """

    leaf: Leaf
    box: Box
    tensor: torch.Tensor
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ObjectLeaf:
    """One tracked item's structure: its value encoded by ``encode_object``, with ``Ref`` nodes in
    place of tensors.
    """

    leaf: Leaf
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """Everything that was tracked, at one moment.

    ``tensors`` holds aliases too (``leaf.alias_of`` set). If nothing moved since the last capture
    of the same plan it is the same tuple object, so a copy plan made for it still fits.
    """

    tensors: tuple[TensorLeaf, ...]
    objects: tuple[ObjectLeaf, ...]


CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What activation checkpointing adds to the names of the modules that it wraps."""


def escape(component: object) -> str:
    """One path component: text in which ``/`` and ``%`` are percent-escaped; a lone surrogate
    becomes ``%uXXXX``.
    """
    text = str(component).replace("%", "%25").replace("/", "%2F")
    return (
        "".join(f"%u{ord(c):04X}" if "\ud800" <= c <= "\udfff" else c for c in text)
        if not text.isascii()
        else text
    )


def join(path: str, component: object) -> str:
    """``path`` and one more component, joined by ``/``; an empty path is the root."""
    return f"{path}/{escape(component)}" if path else escape(component)


def clean_fqn(root: nn.Module, key: str) -> str:
    """A state-dict key without what wrappers add to it (DDP, torch.compile, activation
    checkpointing).

    The same name as ``torch.distributed.checkpoint.state_dict.get_model_state_dict`` gives. Parts
    of a key that lead to no attribute (a state-dict hook made them) are kept as they are.
    """
    key = key.replace(CHECKPOINT_WRAPPER, "")
    if "." not in key:
        return key
    at: object = root
    kept: list[str] = []
    for part in key.split("."):
        if isinstance(at, DistributedDataParallel) and part == "module":
            at = at.module
            continue
        if part == "_orig_mod" and _is_compiled(at):
            at = getattr(at, part)
            continue
        modifiers = getattr(at, "_fqn_modifiers", None)
        if callable(modifiers):
            removed = modifiers().get(part)
            at = getattr(at, removed, at) if removed else at
        kept.append(part)
        at = getattr(at, part, None)
    return ".".join(kept).replace(CHECKPOINT_WRAPPER, "")


def _is_compiled(value: object) -> bool:
    """Whether ``torch.compile`` wrapped it. Imports nothing: torch's compiler takes a second to
    load and may not be in use.
    """
    module = sys.modules.get("torch._dynamo.eval_frame")
    return module is not None and isinstance(value, module.OptimizedModule)
