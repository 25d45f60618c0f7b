"""What other checkpointing libraries get wrong, tried here: each test is named after the
failure."""

from __future__ import annotations

import math
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.damage import without_second_copies
from kit.template import run
from torch import nn

import ckpt
from ckpt.backends.base import Backend, Buffer
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.cli.main import run as cli
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.testing.sample import damage

WAIT_S = 30.0
SOAK = os.environ.get("CKPT_SOAK") == "1"
EXAMPLES = 2000 if SOAK else 30
ROOT = Path(__file__).parents[3]


def filled(step: int, size: int = 3000) -> dict[str, object]:
    """A state that says its step everywhere."""
    return {
        "state": {"a": torch.full((size,), float(step)), "b": torch.full((7,), step), "step": step}
    }


def steps_seen(state: dict[str, object]) -> set[float]:
    inner = state["state"]
    assert isinstance(inner, dict)
    return {
        float(inner["step"]),
        *inner["a"].unique().tolist(),
        *map(float, inner["b"].unique().tolist()),
    }


def two_snapshots(store: str | Backend) -> None:
    with ckpt.Checkpointer(store, job="job", compression="off") as checkpointer:
        for step in (1, 2):
            checkpointer.save(filled(step), step=step, tag=f"tag-{step}")


def covered(backend: Backend, key: str, offset: int) -> bool:
    """Whether a byte of an object means anything: packs have gaps between chunks that nobody
    reads."""
    if not key.startswith("packs/"):
        return True
    state = Journal.open(backend).refresh()
    for entry in state.snapshots:
        for place in load_index(backend, state, entry.snapshot).locations().values():
            if (
                place.pack == key
                and place.offset_bytes <= offset < place.offset_bytes + place.stored_bytes
            ):
                return True
    return False


@pytest.fixture(scope="module")
def clean() -> MemoryBackend:
    backend = MemoryBackend("flips")
    two_snapshots(backend)
    without_second_copies(backend)  # they would be taken instead
    return backend


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(choice=st.randoms(use_true_random=False))
def test_one_flipped_bit_in_any_object_is_found_and_never_restored(
    clean: MemoryBackend, choice: object
) -> None:
    assert hasattr(choice, "choice")
    backend = MemoryBackend("flipped")
    for entry in clean.list(""):
        data = bytearray(entry.size_bytes)
        clean.read_into(entry.key, memoryview(data))
        backend.put(entry.key, [data])
    hit = choice.choice([entry for entry in backend.list("") if entry.size_bytes])
    offset = choice.randrange(hit.size_bytes)
    meant = covered(backend, hit.key, offset)
    damage(backend, hit.key, offset)
    where = f"{hit.key} at {offset}"
    live = filled(0)
    checkpointer = ckpt.Checkpointer(backend)
    try:
        found = checkpointer.restore(live)
        assert steps_seen(live) == {float(found.step)}, where
    except ckpt.CkptError:
        found = None
    assert not meant or found_by_verify(backend), f"verify missed {where}"


def found_by_verify(backend: Backend) -> bool:
    """Whether the damage shows: in a report, in the log's state, or as an error."""
    try:
        checkpointer = ckpt.Checkpointer(backend)
        infos = checkpointer.snapshots()
        reports = [
            checkpointer.verify(step=info.step, epoch=info.epoch)
            for info in infos
            if info.problem is None
        ]
    except ckpt.IntegrityError:
        return True
    doubtful = len(infos) < 2 or any(info.problem or info.maybe_stale for info in infos)
    return doubtful or any(not report.ok for report in reports)


@pytest.mark.parametrize("prefix", ["packs/", "parts/", "manifests/", "log/", "ckpt.json"])
def test_command_line_finds_a_flipped_bit(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FileBackend(tmp_path / "store")
    two_snapshots(store)
    assert cli(["verify", str(tmp_path / "store"), "--all"]) == 0
    damage(store, list(store.list(prefix))[-1].key, 20)
    assert cli(["verify", str(tmp_path / "store"), "--all"]) == ckpt.IntegrityError.exit_code
    capsys.readouterr()


def test_flipped_bit_in_a_fold_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend("folds")
    two_snapshots(backend)
    journal = Journal.open(backend)
    newest = journal.refresh().newest()
    assert newest is not None
    while not list(backend.list("folds/")):
        journal.tag("busy", newest)
    damage(backend, next(backend.list("folds/")).key, 300)
    live = filled(0)
    with ckpt.Checkpointer(backend) as checkpointer:
        assert checkpointer.restore(live).step == 2
    assert steps_seen(live) == {2.0}


def test_damaged_newest_falls_back_to_an_exact_older_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileBackend(tmp_path / "store")
    two_snapshots(store)
    damage(store, list(store.list("packs/"))[-1].key, 20)
    live = filled(0)
    with ckpt.Checkpointer(store) as checkpointer:
        assert checkpointer.restore(live).step == 1
        with pytest.raises(ckpt.IntegrityError):
            checkpointer.restore(filled(0), step=2)
    assert steps_seen(live) == {1.0}
    assert "can't be read whole" in caplog.text


def test_bit_flipped_on_the_way_to_the_store_is_found_by_restore(tmp_path: Path) -> None:
    flipping = FaultyBackend(
        FileBackend(tmp_path / "store"), [Fault(harm=Harm.FLIPPED, op="put", key="packs/", skip=1)]
    )
    two_snapshots(flipping)
    assert flipping.struck
    live = filled(0)
    with ckpt.Checkpointer(str(tmp_path / "store")) as checkpointer:
        found = checkpointer.restore(live)
    assert steps_seen(live) == {float(found.step)}


class Slow:
    """A memory store whose puts of packs wait until the test lets them through."""

    def __init__(self) -> None:
        self._inner = MemoryBackend("slow")
        self.gate = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def put(self, key: str, data: list[Buffer], *, create_only: bool = False) -> None:
        if key.startswith("packs/"):
            assert self.gate.wait(WAIT_S)
        self._inner.put(key, data, create_only=create_only)


@pytest.mark.parametrize("in_flight", [2, 3])
def test_overlapping_saves_with_reused_staging_never_mix_steps(in_flight: int) -> None:
    store = Slow()
    state = filled(0)
    inner = state["state"]
    assert isinstance(inner, dict)
    with ckpt.Checkpointer(store, slots=in_flight, compression="off") as checkpointer:  # type: ignore[arg-type]
        for turn in range(3):
            store.gate.clear()
            pendings = []
            for step in range(turn * in_flight + 1, (turn + 1) * in_flight + 1):
                inner["a"].fill_(step)
                inner["b"].fill_(step)
                inner["step"] = step
                pendings.append(checkpointer.save_async(state, step=step))
                inner["a"].fill_(-1)  # training goes on at once
                inner["b"].fill_(-1)
                inner["step"] = -1
            assert not any(pending.done() for pending in pendings)
            store.gate.set()
            assert [pending.durable(WAIT_S).step for pending in pendings] == [
                pending.step for pending in pendings
            ]
        for step in range(1, 3 * in_flight + 1):
            live = filled(0)
            checkpointer.restore(live, step=step)
            assert steps_seen(live) == {float(step)}


def by_data(model: nn.Linear, value: float) -> None:
    model.weight.data = torch.full((3, 4), value)


def by_state_dict(model: nn.Linear, value: float) -> None:
    model.load_state_dict({"weight": torch.full((3, 4), value), "bias": torch.zeros(3)})


def by_assigned_state_dict(model: nn.Linear, value: float) -> None:
    fresh = {
        "weight": nn.Parameter(torch.full((3, 4), value)),
        "bias": nn.Parameter(torch.zeros(3)),
    }
    model.load_state_dict(fresh, assign=True)


def by_numpy(model: nn.Linear, value: float) -> None:
    model.weight.detach().numpy()[:] = value


def by_set(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.set_(torch.full((3, 4), value))


def in_place(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def by_new_parameter(model: nn.Linear, value: float) -> None:
    model.weight = nn.Parameter(torch.full((3, 4), value))


@pytest.mark.parametrize(
    "change",
    [in_place, by_data, by_state_dict, by_assigned_state_dict, by_numpy, by_set, by_new_parameter],
)
def test_snapshots_after_the_first_are_no_stale_copies(
    change: Callable[[nn.Linear, float], None],
) -> None:
    model = nn.Linear(4, 3)
    with ckpt.Checkpointer(MemoryBackend("stale")) as checkpointer:
        for step in range(1, 5):
            change(model, float(step))
            checkpointer.save({"model": model}, step=step)
        for step in range(1, 5):
            assert checkpointer.read("model/weight", step=step).unique().tolist() == [step]


@pytest.mark.slow
def test_save_never_syncs_the_whole_host(tmp_path: Path) -> None:
    program = f"""
import ctypes, os, torch, ckpt
def refuse(*a): raise SystemExit("the whole host is synced")
os.sync = refuse
os.system = refuse
with ckpt.Checkpointer({str(tmp_path / "store")!r}) as c:
    c.save({{"state": {{"x": torch.zeros(1000)}}}}, step=1)
"""
    run([sys.executable, "-c", program], check=True, timeout=60)
    calls = [
        line
        for path in sources()
        for line in path.read_text().splitlines()
        if re.search(r"\b(os\.sync|syncfs)\b", line)
    ]
    assert calls == []


def sources() -> list[Path]:
    return [*sorted((ROOT / "ckpt").rglob("*.py")), *sorted((ROOT / "integrations").rglob("*.py"))]


def test_no_source_unpickles() -> None:
    hostile = re.compile(
        r"pickle\.loads?\b|Unpickler|weights_only\s*=\s*False|allow_pickle\s*=\s*True|marshal|\beval\(|\bexec\("
    )
    found = [
        f"{path}: {line}"
        for path in sources()
        for line in path.read_text().splitlines()
        if hostile.search(line)
    ]
    assert [one for one in found if "``" not in one] == []
    loads = [
        call for path in sources() for call in re.findall(r"torch\.load\([^)]*\)", path.read_text())
    ]
    assert loads
    assert all("weights_only=True" in call for call in loads)


class Canary:
    """What would run, were it unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (os.mkdir, (str(self._path),))


def test_pickle_in_any_record_is_refused_and_never_executed(tmp_path: Path) -> None:

    bomb = pickle.dumps(Canary(tmp_path / "canary"))
    clean = MemoryBackend("bombs")
    two_snapshots(clean)
    for prefix in ("ckpt.json", "log/", "manifests/", "parts/", "packs/"):
        backend = MemoryBackend("bombed")
        for entry in clean.list(""):
            data = bytearray(entry.size_bytes)
            clean.read_into(entry.key, memoryview(data))
            is_bomb = entry.key.removeprefix("copies/").startswith(prefix)
            backend.put(entry.key, [bomb if is_bomb else data])
        with pytest.raises(ckpt.CkptError):
            ckpt.Checkpointer(backend).restore(filled(0))
        with pytest.raises(ckpt.CkptError):
            ckpt.Checkpointer(backend).read("state/a")
    assert not (tmp_path / "canary").exists()


def test_object_that_only_pickle_could_store_is_refused_by_save(tmp_path: Path) -> None:
    with (
        ckpt.Checkpointer(MemoryBackend("refused")) as checkpointer,
        pytest.raises(ckpt.UsageError, match="state/bomb"),
    ):
        checkpointer.save({"state": {"bomb": Canary(tmp_path / "canary")}}, step=1)
    assert not (tmp_path / "canary").exists()


def make_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    found = {name: one for name, one in vars(torch.optim).items() if isinstance(one, type)}
    return {
        name: one
        for name, one in sorted(found.items())
        if issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
    }


OPTIMIZERS = make_optimizers()
"""All of them; those that need other input than dense matrices get it in ``train``."""


def train(kind: str, checkpointer: ckpt.Checkpointer | None) -> list[bytes]:
    """Six steps of one optimizer, with a snapshot of each where there is a checkpointer; the end
    state's bytes."""
    torch.manual_seed(3)
    sparse = kind == "SparseAdam"
    model: nn.Module = (
        nn.Embedding(9, 4, sparse=True)
        if sparse
        else nn.Sequential(nn.Linear(4, 5, bias=kind != "Muon"))
    )
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=0.01)  # type: ignore[call-arg]

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = model(torch.randint(9, (3,)) if sparse else torch.randn(6, 4)).square().sum()
        found.backward()
        return found

    pendings = []
    for step in range(1, 7):
        if kind == "LBFGS":
            optimizer.step(loss)  # type: ignore[arg-type]
        else:
            loss()
            optimizer.step()
        if checkpointer is not None:
            pendings.append(
                checkpointer.save_async({"model": model, "optimizer": optimizer}, step=step)
            )
    for pending in pendings:
        pending.durable(WAIT_S)
    state = optimizer.state_dict()["state"]
    tensors = [*model.state_dict().values(), *flat(state), torch.get_rng_state()]
    return [one.detach().contiguous().numpy().tobytes() for one in tensors]


def flat(value: object) -> list[torch.Tensor]:
    match value:
        case torch.Tensor():
            return [value]
        case dict():
            return [tensor for one in value.values() for tensor in flat(one)]
        case list() | tuple():
            return [tensor for one in value for tensor in flat(one)]
        case bool() | int() | float():
            return [torch.tensor(value)]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_snapshots_change_nothing_that_an_optimizer_does(kind: str) -> None:
    calm = train(kind, None)
    with ckpt.Checkpointer(MemoryBackend("observed"), slots=3) as checkpointer:
        observed = train(kind, checkpointer)
    assert observed == calm
    assert not any(
        math.isnan(x) for x in torch.frombuffer(bytearray(calm[0]), dtype=torch.float32).tolist()
    )
