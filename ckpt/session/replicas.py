"""Replicas must be equal: compared by digest once, the first time that a set of replicated leaves is met.

Who stores which bytes of a replicated tensor is computed, not agreed, so each rank stores its share of its own copy. Were the
copies different, the snapshot would be a mixture of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch

from ckpt.capture.leaves import TensorLeaf
from ckpt.errors import UsageError
from ckpt.format.digest import digest_hex
from ckpt.ipc.mailbox import Channel, wait_for

COMPARE_WAIT_S = 1800.0
NAMED_MAX = 5


def compare_replicas(
    channel: Channel, leaves: Sequence[TensorLeaf], *, n: int, stop: Callable[[], bool] | None = None
) -> None:
    """Check that every replica of ``leaves`` has the same bytes. All ranks call it with the same ``n``, counted up.

    Costs one digest pass over the local copies and one message a rank. Waits for the other ranks' digests; once ``stop()`` is
    true that raises UnavailableError. Raises UsageError naming the leaves that differ.
    """
    if channel.size == 1:
        return
    mine = {leaf.leaf.name: _digest(leaf.tensor) for leaf in leaves}
    channel.post(f"replicas/{n}/{channel.rank}", msgspec.json.encode(mine))
    theirs: dict[int, dict[str, str]] = {}
    differing: list[str] = []
    for leaf in leaves:
        first = leaf.replicas[0]
        if first == channel.rank:
            continue
        if first not in theirs:
            word = wait_for(
                channel,
                f"replicas/{n}/{first}",
                timeout_s=COMPARE_WAIT_S,
                what=f"rank {first}'s digests of replicated leaves",
                stop=stop,
            )
            theirs[first] = msgspec.json.decode(word, type=dict[str, str])
        if theirs[first].get(leaf.leaf.name) != mine[leaf.leaf.name]:
            differing.append(f"{leaf.leaf.name} (ranks {first} and {channel.rank})")
    if differing:
        named = ", ".join(differing[:NAMED_MAX])
        more = f" and {len(differing) - NAMED_MAX} more" if len(differing) > NAMED_MAX else ""
        raise UsageError(
            f"replicas differ between ranks, so they are not one tensor. leaves={named}{more}; synchronise them (a "
            "data-parallel wrapper broadcasts parameters once, when it is made), or track the unwrapped module to store each "
            "rank's own"
        )


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return digest_hex(flat.view(torch.uint8).numpy().data) if flat.numel() else ""
