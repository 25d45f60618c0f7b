"""State that each rank's optimizer keeps of its own piece of a parameter fits that piece alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ckpt.capture.leaves import Capture, World
from ckpt.capture.plan import capture
from ckpt.errors import UsageError
from ckpt.format.objects import StateNode, decode_object, encode_object
from ckpt.restore.apply.apply import apply

from .test_apply_layouts import hybrid, plain, ranks_of, sharded

Items = dict[str, object]
Store = Callable[..., object]
Wrap = Callable[[nn.Module], nn.Module]


def make(wrap: Wrap, scale: torch.Tensor | None) -> Items:
    """A module of one weight of 12 rows, and an optimizer that keeps scales of its rank's rows."""
    net = wrap(nn.Linear(2, 12, bias=False))
    (weight,) = net.parameters()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    if scale is not None:
        optimizer.state[weight] = {"scale": scale, "count": 3}
    return {"model": net, "optimizer": optimizer}


def captured(wrap: Wrap, size: int, scale: Callable[[int], torch.Tensor]) -> list[Capture]:
    found = []
    for rank in range(size):
        with ranks_of(rank, size) as world:
            found.append(capture(make(wrap, scale(rank)), world=world))
    return found


def test_state_in_containers_is_looked_at_too(store: Store) -> None:
    found = []
    for rank in range(2):
        with ranks_of(rank, 2) as world:
            items = make(sharded, None)
            (weight,) = items["model"].parameters()  # type: ignore[attr-defined]
            items["optimizer"].state[weight] = {"factors": {"left": [by_rank(rank)]}}  # type: ignore[attr-defined]
            found.append(capture(items, world=world))
    with pytest.raises(UsageError, match="path='optimizer/state/weight/factors/left/0'"):
        restored(store(*found), sharded, 0, 3)


def by_rank(rank: int) -> torch.Tensor:
    return torch.full((3,), float(rank))


def restored(snapshot: object, wrap: Wrap, rank: int, size: int, **options: object) -> torch.Tensor:
    with ranks_of(rank, size) as world:
        items = make(wrap, None)
        apply(items, snapshot.index, read=snapshot.read, world=world, **options)  # type: ignore
        (entry,) = items["optimizer"].state.values() or [{}]  # type: ignore[attr-defined]
        return entry.get("scale")


def test_own_state_goes_to_the_rank_with_the_same_piece(store: Store) -> None:
    snapshot = store(*captured(sharded, 2, by_rank))
    assert restored(snapshot, sharded, 1, 2).tolist() == [1.0] * 3
    # Of four ranks in two replicas, rank 3 holds the piece that rank 1 held.
    assert restored(snapshot, hybrid, 3, 4).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("wrap", "size", "rank"), [(sharded, 3, 0), (sharded, 3, 2), (sharded, 4, 1), (plain, 1, 0)]
)
def test_own_state_of_another_piece_is_refused_by_name(
    store: Store, wrap: Wrap, size: int, rank: int
) -> None:
    snapshot = store(*captured(sharded, 2, by_rank))
    with pytest.raises(UsageError, match="path='optimizer/state/weight/scale'") as caught:
        restored(snapshot, wrap, rank, size)
    assert "nothing was changed" in str(caught.value)


def test_other_layout_over_as_many_ranks_is_refused(store: Store) -> None:
    snapshot = store(*captured(sharded, 4, by_rank))
    with pytest.raises(UsageError, match="path='optimizer/state/weight/scale'"):
        restored(snapshot, hybrid, 1, 4)


def test_state_of_a_whole_parameter_is_refused_for_a_piece_of_it(store: Store) -> None:
    with ranks_of(0, 1) as world:
        snapshot = store(capture(make(plain, by_rank(0)), world=world))
    with pytest.raises(UsageError, match="path='optimizer/state/weight/scale'"):
        restored(snapshot, sharded, 0, 2)


def test_single_number_that_all_ranks_held_alike_goes_anywhere(store: Store) -> None:
    snapshot = store(*captured(sharded, 2, lambda rank: torch.full((1,), 7.0)))
    assert restored(snapshot, sharded, 2, 3).tolist() == [7.0]
    differing = store(*captured(sharded, 2, lambda rank: torch.full((1,), float(rank))))
    with pytest.raises(UsageError, match="path='optimizer/state/weight/scale'"):
        restored(differing, sharded, 2, 3)


def test_own_state_may_be_left_out(store: Store) -> None:
    snapshot = store(*captured(sharded, 2, by_rank))
    with ranks_of(0, 3) as world:
        items = make(sharded, None)
        only = ["model", "optimizer/param_groups"]
        apply(items, snapshot.index, read=snapshot.read, world=world, only=only)  # type: ignore


def without_boxes(found: list[Capture]) -> list[Capture]:
    """As releases before wrote it."""
    older = []
    for one in found:
        objects = []
        for leaf in one.objects:
            node = decode_object(leaf.data)
            if isinstance(node, StateNode):
                node = node.state
            assert isinstance(node, dict)
            node.pop("boxes", None)
            data = encode_object(node)
            shape = (len(data),)
            objects.append(
                dataclasses.replace(
                    leaf, data=data, leaf=dataclasses.replace(leaf.leaf, shape=shape)
                )
            )
        older.append(dataclasses.replace(one, objects=tuple(objects)))
    return older


def test_snapshot_without_pieces_restores_into_as_many_ranks_only(store: Store) -> None:
    snapshot = store(*without_boxes(captured(sharded, 2, by_rank)))
    assert restored(snapshot, sharded, 1, 2).tolist() == [1.0] * 3
    with pytest.raises(UsageError, match="path='optimizer/state/weight/scale'"):
        restored(snapshot, sharded, 1, 3)


def test_state_of_parameters_that_each_rank_has_for_itself_follows_its_rank(store: Store) -> None:
    found = [capture(make(plain, by_rank(rank)), world=World(rank, 2)) for rank in range(2)]
    items = make(plain, None)
    snapshot = store(*found)
    apply(items, snapshot.index, read=snapshot.read, world=World(2, 3))  # type: ignore[attr-defined]
    (entry,) = items["optimizer"].state.values()  # type: ignore[attr-defined]
    assert entry["scale"].tolist() == [0.0] * 3


def test_state_as_large_as_a_parameter_that_was_whole_is_cut_as_it_is(store: Store) -> None:
    moments = torch.arange(24.0).reshape(12, 2)
    snapshot = store(capture(make(plain, moments), world=World(0, 1)))
    found = restored(snapshot, sharded, 1, 2)
    assert found._local_tensor.tolist() == moments[6:].tolist()  # type: ignore[attr-defined]
