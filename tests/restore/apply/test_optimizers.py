"""Every optimizer of torch: capturing changes nothing, and a restored run goes on bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World
from ckpt.capture.plan import CapturePlan, capture
from ckpt.errors import UsageError
from ckpt.restore.apply.apply import apply

WORLD = World(0, 1)
STEPS = 4
Items = dict[str, object]
Make = Callable[[list[nn.Parameter]], Optimizer]

VARIANTS: dict[str, Make] = {
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "Adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True),
    "Adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW": torch.optim.AdamW,
    "AdamW groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.3}, {"params": p[1:], "betas": (0.5, 0.6)}]
    ),
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda p: torch.optim.LBFGS(p, history_size=3, max_iter=3),
    "LBFGS wolfe": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SparseAdam": torch.optim.SparseAdam,
}
if hasattr(torch.optim, "Muon"):
    VARIANTS["Muon"] = lambda p: torch.optim.Muon([one for one in p if one.ndim == 2])


class Net(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, sparse=sparse)
        self.linear = nn.Linear(4, 4) if not sparse else nn.Identity()
        self.unused = nn.Parameter(torch.ones(2, 2), requires_grad=not sparse)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(rows)).square().mean()


def make(name: str) -> Items:
    torch.manual_seed(1)
    model = Net(sparse=name == "SparseAdam")
    parameters = [one for one in model.parameters() if one.requires_grad]
    return {"model": model, "optimizer": VARIANTS[name](parameters), "progress": {"step": 0}}


def train_step(items: Items) -> None:
    model, optimizer, progress = items["model"], items["optimizer"], items["progress"]
    assert (
        isinstance(model, nn.Module)
        and isinstance(optimizer, Optimizer)
        and isinstance(progress, dict)
    )
    rows = torch.randint(0, 7, (5,))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(rows)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    progress["step"] += 1


def fingerprint(items: Items) -> dict[str, object]:
    """Everything that is captured, by value."""
    found = capture(items, world=WORLD)
    tensors: dict[str, object] = {
        one.leaf.name: (one.leaf, one.tensor.clone().tolist()) for one in found.tensors
    }
    return {
        **tensors,
        **{one.leaf.name: one.data for one in found.objects},
        "rng": torch.get_rng_state().tolist(),
    }


def test_every_optimizer_of_torch_is_tried() -> None:
    known = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    assert known == {name.split()[0] for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_run_captured_each_step_is_the_run_never_captured(name: str) -> None:
    watched = make(name)
    plan = CapturePlan(watched, WORLD)
    for _ in range(STEPS):
        plan.capture()
        train_step(watched)
    after = fingerprint(watched)
    alone = make(name)
    for _ in range(STEPS):
        train_step(alone)
    assert fingerprint(alone) == after


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_restored_run_goes_on_bit_for_bit(
    name: str, done: int, store: Callable[..., object]
) -> None:
    first = make(name)
    for _ in range(done):
        train_step(first)
    before = fingerprint(first)
    snapshot = store(capture(first, world=WORLD))
    rng = torch.get_rng_state()
    second, later = make(name), make(name)
    for _ in range(3):
        train_step(later)
    for items in (second, later):
        apply(items, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
        torch.set_rng_state(rng)
        assert fingerprint(items) == before
    results = []
    for items in (first, second, later):
        torch.set_rng_state(rng)
        train_step(items)
        results.append(fingerprint(items))
    assert results[0] == results[1] == results[2]


def test_parameter_without_state_has_none_after_restore(store: Callable[..., object]) -> None:
    items = make("AdamW")
    train_step(items)
    snapshot = store(capture(items, world=WORLD))
    model, optimizer = items["model"], items["optimizer"]
    assert isinstance(model, Net) and isinstance(optimizer, Optimizer)
    optimizer.state[model.unused] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2)}
    apply(items, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
    assert model.unused not in optimizer.state


def test_state_tensors_are_filled_in_their_own_memory(store: Callable[..., object]) -> None:
    items = make("Adam")
    train_step(items)
    snapshot = store(capture(items, world=WORLD))
    train_step(items)
    model, optimizer = items["model"], items["optimizer"]
    assert isinstance(model, Net) and isinstance(optimizer, Optimizer)
    before = {key: id(value) for key, value in optimizer.state[model.embed.weight].items()}
    groups = [id(one) for one in optimizer.param_groups]
    apply(items, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
    assert {key: id(value) for key, value in optimizer.state[model.embed.weight].items()} == before
    assert [id(one) for one in optimizer.param_groups] == groups


def test_expanded_state_is_made_anew(store: Callable[..., object]) -> None:
    """An optimizer may share one number among all rows; a fresh process has no such state yet."""

    def made(value: float) -> torch.optim.Optimizer:
        parameter = nn.Parameter(torch.ones(3, 2))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        optimizer.state[parameter] = {"scale": torch.full((1, 2), value).expand(3, 2)}
        return optimizer

    snapshot = store(capture({"o": made(4.0)}, world=WORLD))
    for live in (made(0.0), torch.optim.SGD([nn.Parameter(torch.ones(3, 2))], lr=0.1)):
        apply({"o": live}, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore
        ((entry),) = live.state.values()
        assert torch.equal(entry["scale"], torch.full((3, 2), 4.0))


def test_one_optimizer_over_two_models_with_equal_names(store: Callable[..., object]) -> None:
    def pair() -> tuple[Items, Optimizer]:
        generator, critic, loose = nn.Linear(2, 2), nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD(
            [*generator.parameters(), *critic.parameters(), loose], lr=0.1, momentum=0.5
        )
        for number, one in enumerate(optimizer.param_groups[0]["params"]):
            one.grad = torch.full_like(one, float(number))
        return {"models": {"g": generator, "c": critic}, "optimizer": optimizer}, optimizer

    items, optimizer = pair()
    optimizer.step()
    found = capture(items, world=WORLD)
    names = [one.leaf.name for one in found.tensors if one.leaf.name.startswith("optimizer/")]
    assert "optimizer/state/models/g/weight/momentum_buffer" in names
    assert "optimizer/state/models/c/bias/momentum_buffer" in names
    assert "optimizer/state/group0/param4/momentum_buffer" in names
    snapshot = store(found)
    others, again = pair()
    apply(others, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
    for mine, theirs in zip(
        optimizer.param_groups[0]["params"], again.param_groups[0]["params"], strict=True
    ):
        expected = optimizer.state[mine]["momentum_buffer"]
        assert torch.equal(expected, again.state[theirs]["momentum_buffer"])


def test_parameter_of_two_modules_is_named_by_the_first() -> None:
    first, second = (
        nn.Linear(2, 2, bias=False),
        nn.ModuleDict({"inner": nn.Linear(2, 2, bias=False)}),
    )
    second["inner"].weight = first.weight
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.5)
    first.weight.grad = torch.ones(2, 2)
    optimizer.step()
    found = {
        one.leaf.name: one.leaf
        for one in capture({"a": first, "b": second, "o": optimizer}, world=WORLD).tensors
    }
    assert found["b/inner.weight"].alias_of == "a/weight"
    assert "o/state/weight/momentum_buffer" in found


def test_hooks_on_steps_are_not_fired(store: Callable[..., object]) -> None:
    items = make("Adam")
    train_step(items)
    optimizer = items["optimizer"]
    assert isinstance(optimizer, Optimizer)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    snapshot = store(capture(items, world=WORLD))
    apply(items, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
    assert fired == []


def test_other_groups_are_refused_and_state_alone_is_not(store: Callable[..., object]) -> None:
    items = make("AdamW groups")
    train_step(items)
    snapshot = store(capture(items, world=WORLD))
    others = make("AdamW")
    with pytest.raises(UsageError, match="numbers of parameter groups differ"):
        apply(others, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
    optimizer = others["optimizer"]
    assert isinstance(optimizer, Optimizer) and not optimizer.state
    apply(
        others, snapshot.index, read=snapshot.read, world=WORLD, only=["model", "optimizer/state"]
    )  # type: ignore[attr-defined]
    assert optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.001


def test_state_that_lies_in_a_row_is_refused_for_parameters_in_another_order(
    store: Callable[..., object],
) -> None:
    def made(order: tuple[int, int]) -> Items:
        layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        weights = list(layers.parameters())
        optimizer = torch.optim.LBFGS([weights[place] for place in order])

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found = layers(torch.ones(1, 2)).square().sum()
            found.backward()
            return found

        optimizer.step(loss)
        return {"model": layers, "optimizer": optimizer}

    snapshot = store(capture(made((0, 1)), world=WORLD))
    with pytest.raises(UsageError, match=r"another order.*path='optimizer'"):
        apply(made((1, 0)), snapshot.index, read=snapshot.read, world=WORLD)
    apply(made((0, 1)), snapshot.index, read=snapshot.read, world=WORLD)


class Wrapping(torch.optim.SGD):
    """An optimizer that moves weights by a second one inside it, as many recipes do."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)
        self.base = torch.optim.AdamW(parameters)


class Counting(torch.optim.SGD):
    """An optimizer with an entry of its own in its state dict."""

    def state_dict(self) -> dict[str, object]:
        return {**super().state_dict(), "rounds": 3}


def test_optimizer_with_another_one_inside_is_refused_by_name_unless_both_are_tracked() -> None:
    outer = Wrapping([nn.Parameter(torch.zeros(2))])
    with pytest.raises(UsageError, match=r"item='outer' type=Wrapping attribute='base'"):
        capture({"outer": outer}, world=WORLD)
    capture({"outer": outer, "base": outer.base}, world=WORLD)


def test_optimizers_in_a_list_inside_another_one_are_refused_unless_tracked() -> None:
    outer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    inner = torch.optim.AdamW(outer.param_groups[0]["params"])
    outer.parts = [inner]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"item='outer' type=SGD attribute='parts'"):
        capture({"outer": outer}, world=WORLD)
    capture({"outer": outer, "parts": [inner]}, world=WORLD)


def test_refused_optimizer_that_joined_later_is_refused_each_time() -> None:
    optimizers: list[object] = []
    plan = CapturePlan({"optimizers": optimizers}, WORLD)
    optimizers.append(Counting([nn.Parameter(torch.zeros(2))]))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"item='optimizers/0' type=Counting"):
            plan.capture()


def test_optimizer_whose_state_dict_fails_is_refused_by_name() -> None:
    class Failing(torch.optim.SGD):
        def state_dict(self) -> dict[str, object]:
            raise NotImplementedError("use another one")

    with pytest.raises(UsageError, match=r"item='optimizer' type=.*Failing.*use another one"):
        capture({"optimizer": Failing([nn.Parameter(torch.zeros(2))])}, world=WORLD)


def test_optimizer_whose_class_adds_entries_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"type=Counting entries=\['rounds'\]"):
        capture({"optimizer": Counting([nn.Parameter(torch.zeros(2))])}, world=WORLD)
