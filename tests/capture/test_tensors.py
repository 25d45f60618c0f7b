"""One tensor to one leaf: dtypes, layouts and refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ckpt.capture.leaves import World
from ckpt.capture.plan import CapturePlan, capture
from ckpt.capture.tensors import dtype_name
from ckpt.errors import UsageError
from ckpt.values import DTYPE_BYTES

WORLD = World(2, 4)


def one(tensor: torch.Tensor) -> object:
    (found,) = capture({"d": {"t": tensor}}, world=WORLD).tensors
    return found


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", [name for name in DTYPE_BYTES if hasattr(torch, name)])
def test_each_dtype_is_recorded_by_its_name(name: str) -> None:
    dtype = getattr(torch, name)
    for shape in ((), (0,), (2, 3)):
        tensor = torch.empty(shape, dtype=dtype)
        assert tensor.element_size() == DTYPE_BYTES[name]
        found = one(tensor)
        assert (found.leaf.dtype, found.leaf.shape, found.leaf.rank, found.replicas) == (
            name,
            shape,
            2,
            (2,),
        )  # type: ignore[attr-defined]


def test_every_dtype_of_torch_is_known_or_is_quantized_or_bits() -> None:
    every = {dtype_name(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
    left = {name for name in every - DTYPE_BYTES.keys() if not name.startswith(("q", "bits"))}
    assert left <= {
        "bcomplex32"
    }  # which torch calls experimental; a tensor of it is refused by name, as those are


def test_strided_view_shares_memory() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    found = one(base.t()[1:])
    assert found.tensor.data_ptr() == base.data_ptr() + 4  # type: ignore[attr-defined]
    assert found.tensor.stride() == (1, 4)  # type: ignore[attr-defined]


def test_conjugate_and_negative_views_are_resolved_anew_each_time() -> None:
    base = torch.tensor([1 + 2j])
    plan = CapturePlan({"d": {"c": base.conj(), "n": base.conj().imag}}, WORLD)
    first = plan.capture().tensors
    assert [item.tensor.tolist() for item in first] == [[1 - 2j], [-2.0]]
    assert not any(item.tensor.is_conj() or item.tensor.is_neg() for item in first)
    base[0] = 3 + 4j
    assert [item.tensor.tolist() for item in plan.capture().tensors] == [[3 - 4j], [-4.0]]


class Tagged(torch.Tensor):
    """Data where a plain tensor has it."""


def test_subclass_without_own_dispatch_is_kept_as_plain_tensor() -> None:
    found = one(torch.ones(2).as_subclass(Tagged))
    assert type(found.tensor) is torch.Tensor  # type: ignore[attr-defined]


class Wrapped(torch.Tensor):
    """Data elsewhere."""

    @classmethod
    def __torch_dispatch__(
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        raise AssertionError("not reached")


def wrapped() -> torch.Tensor:
    return torch.Tensor._make_wrapper_subclass(Wrapped, (2,))  # type: ignore[attr-defined,no-any-return]


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: torch.ones(2, device="meta"), "materialise it first"),
        (lambda: torch.ones(2).to_sparse(), "to_dense"),
        (quantized, "int_repr"),
        (nested, "values"),
        (wrapped, "plain tensors inside"),
    ],
)
def test_tensor_that_cannot_be_stored_is_refused_with_name_and_remedy(
    make: object, remedy: str
) -> None:
    with pytest.raises(UsageError, match=remedy) as caught:
        one(make())  # type: ignore[operator]
    assert "leaf='d/t'" in str(caught.value)


def test_lazy_module_is_refused_until_it_ran() -> None:
    model = nn.LazyLinear(2)
    with pytest.raises(UsageError, match=r"run one forward pass.*leaf='m/weight'"):
        CapturePlan({"m": model}, WORLD)
    model(torch.ones(1, 3))
    assert len(capture({"m": model}, world=WORLD).tensors) == 2


def test_meta_module_is_refused_naming_the_leaf() -> None:
    with pytest.raises(UsageError, match="leaf='m/weight'"):
        CapturePlan({"m": nn.Linear(2, 2, device="meta")}, WORLD)
