"""Restoring in place: all differences at once before a byte is written, selection, ties, dtypes,
strides, old worlds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from ckpt.capture.leaves import World
from ckpt.capture.plan import capture
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.objects import Ref
from ckpt.restore.apply.apply import apply
from ckpt.restore.plan import Want
from ckpt.restore.reader import rebuild
from ckpt.values import DTYPE_BYTES

WORLD = World(0, 1)
Store = Callable[..., object]


def save(store: Store, **items: object) -> object:
    return store(capture(items, world=WORLD))


def load(snapshot: object, only: Sequence[str] | None = None, **items: object) -> None:
    apply(items, snapshot.index, read=snapshot.read, world=WORLD, only=only)  # type: ignore[attr-defined]


def test_all_differences_are_listed_at_once_and_nothing_is_written(store: Store) -> None:
    snapshot = save(store, model=nn.Linear(2, 3), extra={"x": 1}, d={"t": torch.ones(2)})
    model = nn.Linear(4, 3).to(torch.float64)
    other = torch.zeros(2, dtype=torch.int64)
    before = [one.clone() for one in model.parameters()]
    with pytest.raises(UsageError) as caught:
        load(snapshot, model=model, d={"t": other}, new={"y": 1})
    text = str(caught.value)
    for part in (
        "shapes differ. stored=(3, 2) live=(3, 4) path='model/weight'",
        "dtypes differ. stored=float32 live=float64 path='model/bias'",
        "dtypes differ. stored=float32 live=int64 path='d/t'",
        "missing in the snapshot. path='new'",
        'missing="keep"',
        "differences=4",
    ):
        assert part in text
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert other.tolist() == [0, 0]


def test_error_is_bounded(store: Store) -> None:
    snapshot = save(store, model=nn.Sequential(*[nn.Linear(1, 1) for _ in range(40)]))
    with pytest.raises(UsageError, match="and 60 more"):
        load(snapshot, model=nn.Sequential(*[nn.Linear(2, 2, bias=True) for _ in range(40)]))


def test_only_selects_by_whole_components(store: Store) -> None:
    first = {"model": nn.Linear(2, 2), "model2": nn.Linear(2, 2), "d": {"a": torch.ones(1), "b": 2}}
    snapshot = save(store, **first)
    live = {
        "model": nn.Linear(2, 2),
        "model2": nn.Linear(3, 3),
        "d": {"a": torch.zeros(1), "b": 5, "c": 6},
    }
    bias = live["model"].bias.tolist()  # type: ignore[attr-defined]
    load(snapshot, only=["model/weight", "d/a"], **live)
    assert torch.equal(live["model"].weight, first["model"].weight)  # type: ignore[attr-defined]
    assert live["model"].bias.tolist() == bias  # type: ignore[attr-defined]
    assert live["d"] == {"a": torch.ones(1), "b": 5, "c": 6}


def test_selection_that_nothing_has_is_refused(store: Store) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="nothing has this path"):
        load(save(store, model=model), only=["modle"], model=model)


def test_missing_keep_leaves_new_parameters_alone(store: Store) -> None:
    snapshot = save(store, model=nn.ModuleDict({"a": nn.Linear(1, 1)}))
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    before = model["b"].weight.item()
    with pytest.raises(UsageError, match=r"path='model/b\.weight'"):
        load(snapshot, model=model)
    apply({"model": model}, snapshot.index, read=snapshot.read, world=WORLD, missing="keep")  # type: ignore[attr-defined]
    assert model["b"].weight.item() == before


def tied(*, tie: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    if tie:
        model[1].weight = model[0].weight
    return model


def test_tied_and_untied_models_restore_each_other_where_bytes_agree(store: Store) -> None:
    together, apart = tied(tie=True), tied(tie=False)
    load(save(store, m=together), m=apart)
    assert torch.equal(apart[0].weight, together[0].weight)
    assert torch.equal(apart[1].weight, together[0].weight)
    fresh = tied(tie=True)
    load(save(store, m=apart), m=fresh)
    assert torch.equal(fresh[0].weight, apart[0].weight)


def test_tied_model_refuses_two_different_stored_values(store: Store) -> None:
    snapshot = save(store, m=tied(tie=False))
    with pytest.raises(UsageError, match="one live tensor, but stored as two"):
        load(snapshot, m=tied(tie=True))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", [name for name in DTYPE_BYTES if hasattr(torch, name)])
def test_every_dtype_comes_back_bit_for_bit_into_any_layout(name: str, store: Store) -> None:
    dtype, size = getattr(torch, name), DTYPE_BYTES[name]

    def filled(value: int, *shape: int) -> torch.Tensor:
        raw = (torch.arange(torch.Size(shape).numel() * size) * 37 + value) % (
            2 if name == "bool" else 256
        )
        stride = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype).set_(
            raw.to(torch.uint8).untyped_storage(), 0, shape, stride
        )

    def strided(value: int) -> torch.Tensor:
        base = filled(value, 4, 6)
        return torch.empty(0, dtype=dtype).set_(base.untyped_storage(), 2, (3, 2), (1, 8))

    def live(value: int) -> dict[str, torch.Tensor]:
        return {"dense": filled(value, 3, 2), "zero": filled(value), "strided": strided(value)}

    def bits(found: dict[str, torch.Tensor]) -> list[bytes]:
        captured = capture({"d": found}, world=WORLD).tensors
        return [bytes_of(one.tensor) for one in captured]

    first, second = live(1), live(90)
    load(save(store, d=first), d=second)
    assert bits(first) == bits(second)


def bytes_of(tensor: torch.Tensor) -> bytes:
    size = tensor.element_size()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[
        size
    ]
    view = torch.empty(0, dtype=kind).set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return view.clone(memory_format=torch.contiguous_format).numpy().tobytes()


def test_views_empty_and_conjugate_tensors_are_filled_in_place(store: Store) -> None:
    first = {
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "e": torch.empty(0, 2),
        "c": torch.tensor([1 + 2j]).conj(),
    }
    second = {
        "t": torch.zeros(2, 3).t(),
        "e": torch.empty(0, 2),
        "c": torch.zeros(1, dtype=torch.complex64).conj(),
    }
    kept = dict(second)
    load(save(store, d=first), d=second)
    assert all(second[key] is kept[key] for key in kept)
    assert torch.equal(second["t"], first["t"])
    assert second["c"].tolist() == [1 - 2j]


def test_expanded_live_tensor_is_refused(store: Store) -> None:
    snapshot = save(store, d={"t": torch.arange(3.0)})
    with pytest.raises(UsageError, match=r"expanded.*clone\(\)"):
        load(snapshot, d={"t": torch.zeros(1).expand(3)})


def test_autograd_notices_a_restore(store: Store) -> None:
    weight = nn.Parameter(torch.ones(2))
    snapshot = save(store, d={"w": weight})
    loss = (weight * weight).sum()
    load(snapshot, d={"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ranks_beyond_the_old_world_take_its_leaves_again(store: Store) -> None:
    old = [{"d": {"rank": rank, "t": torch.full((2,), float(rank))}} for rank in range(2)]
    snapshot = store(*[capture(items, world=World(rank, 2)) for rank, items in enumerate(old)])
    for rank in range(5):
        live = {"d": {"rank": -1, "t": torch.zeros(2)}}
        apply(live, snapshot.index, read=snapshot.read, world=World(rank, 5))  # type: ignore[attr-defined]
        assert live["d"]["rank"] == rank % 2
        assert live["d"]["t"].tolist() == [float(rank % 2)] * 2  # type: ignore[attr-defined]


def test_failing_read_raises_what_it_raised(store: Store) -> None:
    model = nn.Linear(2, 2)
    snapshot = save(store, m=model)

    def broken(wants: Sequence[Want], outputs: Sequence[memoryview]) -> None:
        if any("/" in want.leaf for want in wants):
            raise IntegrityError("digest differs")
        snapshot.read(wants, outputs)  # type: ignore[attr-defined]

    with pytest.raises(IntegrityError, match="digest differs"):
        apply({"m": model}, snapshot.index, read=broken, world=WORLD)  # type: ignore[attr-defined]


def test_structure_is_rebuilt_without_live_objects(store: Store) -> None:
    snapshot = save(store, d={"a": [1, torch.ones(2)], "b": (torch.zeros(()), "x")})
    found = rebuild(snapshot.index, "d", read=snapshot.read, tensors=lambda ref: ref.leaf)  # type: ignore[attr-defined]
    assert found == {"a": [1, "d/a/1"], "b": ("d/b/0", "x")}
    refs = rebuild(snapshot.index, "d", read=snapshot.read, tensors=lambda ref: ref)  # type: ignore[attr-defined]
    assert refs["a"][1] == Ref("d/a/1", "cpu", "")  # type: ignore[index]
    with pytest.raises(NotFoundError, match=r"items=\['d'\]"):
        rebuild(snapshot.index, "e", read=snapshot.read, tensors=lambda ref: ref)  # type: ignore[attr-defined]
