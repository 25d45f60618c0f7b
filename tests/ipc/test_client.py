"""However many look for a keeper, one is started."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from ckpt.errors import InternalError, UnavailableError, UsageError
from ckpt.ipc import client
from ckpt.ipc.client import (
    HungUpError,
    KeeperClient,
    KeeperSpec,
    connect_with_hello,
    ensure_keeper,
    exchange_hello,
)
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    Bye,
    Count,
    Done,
    GetStatus,
    Hello,
    Message,
    Number,
    Peek,
    RemoteError,
    Value,
    Welcome,
)
from ckpt.ipc.runtime_dir import JobFolder

KEEPER = textwrap.dedent("""
    # A keeper that knows four words: it counts, answers what it was told, ends on Bye, and leaves its number in a file.
    import os, sys, time
    from pathlib import Path
    from ckpt.ipc.client import KeeperSpec
    from ckpt.ipc.frames import MessageSocket
    from ckpt.ipc.messages import Number, Value
    from ckpt.ipc.messages import Bye, Count, GetStatus, Peek
    from ckpt.ipc.runtime_dir import JobFolder

    spec = KeeperSpec.decode(sys.stdin.buffer.read())
    folder = JobFolder.at(Path(sys.argv[1]))
    assert Path.cwd() == folder.path
    with (folder.path / "starts").open("a") as starts:
        print(os.getpid(), file=starts)
    print("said on", spec.job, flush=True)
    if spec.job == "broken":
        sys.exit("no memory for this")
    lock = folder.try_lock()
    if lock is None:
        sys.exit(3)
    if spec.job == "deaf":
        time.sleep(60)
    listener = folder.listen()
    folder.write_info(spec.store, spec.job)
    if os.fork():
        os._exit(0)
    count, going = 0, True
    while going:
        wire = MessageSocket(listener.accept()[0])
        while (got := wire.receive()) is not None:
            message = got[0]
            match message:
                case Count():
                    count += message.amount
                    wire.send(Number(id=message.id, number=count))
                case Peek():
                    wire.send(Value(id=message.id, value=repr(spec).encode()))
                case GetStatus():
                    wire.send(Number(id=message.id, number=os.getpid()))
                case Bye():
                    going = False
                    break
        wire.close()
    listener.close()
    folder.remove()
""")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "keeper.py"
    path.write_text(KEEPER)
    return (str(path),)


def spec(job: str = "gpt") -> KeeperSpec:
    return KeeperSpec(
        job=job,
        store="/data/runs",
        storage_options={"key": "secret", "retries": 3},
        compression="off",
    )


def starts(job: str = "gpt") -> int:
    return len((JobFolder("/data/runs", job).path / "starts").read_text().split())


def number(wire: MessageSocket, message: Message) -> int:
    return KeeperClient(wire).ask(message, Number, timeout_s=20).number


def ends(pid: int) -> None:
    """Wait until a process that is nobody's child here has ended."""
    fd = os.pidfd_open(pid)
    ended, _, _ = select.select([fd], [], [], 20)
    os.close(fd)
    assert ended


def end(wire: MessageSocket) -> int:
    """End the keeper, and return which process it was."""
    pid = number(wire, GetStatus())
    wire.send(Bye())
    ends(pid)
    wire.close()
    return pid


# ---- starting


def test_a_keeper_is_started_told_its_specification_and_found_again(program) -> None:
    wire = ensure_keeper(spec(), program=program)
    calls = KeeperClient(wire)
    assert calls.ask(Peek(key=""), Value).value == repr(spec()).encode()
    assert calls.ask(Count(key="", amount=2), Number).number == 2
    wire.close()
    wire = ensure_keeper(spec(), start=False)
    assert number(wire, Count(key="", amount=1)) == 3
    folder = JobFolder("/data/runs", "gpt")
    note = folder.read_info()
    assert note is not None
    assert note.pid != os.getpid()
    assert folder.log_tail() == "said on gpt"
    assert os.getsid(number(wire, GetStatus())) != os.getsid(0)
    end(wire)
    assert not folder.path.exists()


def test_the_specification_is_on_no_command_line(program) -> None:
    wire = ensure_keeper(spec(), program=program)
    pid = number(wire, GetStatus())
    assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    end(wire)


@pytest.mark.slow
def test_many_starters_at_once_start_one_keeper(program) -> None:
    with ThreadPoolExecutor(8) as pool:
        wires = list(pool.map(lambda _: ensure_keeper(spec(), program=program), range(8)))
    assert starts() == 1
    for wire in wires[1:]:
        wire.close()
    end(wires[0])


@pytest.mark.slow
def test_many_processes_at_once_start_one_keeper(program) -> None:
    script = (
        "import sys; from ckpt.ipc.client import *; from ckpt.ipc.messages import *\n"
        "spec = KeeperSpec(job='gpt', store='/data/runs')\n"
        "calls = KeeperClient(ensure_keeper(spec, program=sys.argv[1:]))\n"
        "print(calls.call(GetStatus()).number)\n"
        "calls.forget_after_fork()"
    )
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", script, *program], stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    said = {starter.communicate(timeout=60)[0] for starter in starters}
    assert len(said) == 1
    wire = ensure_keeper(spec(), start=False)
    assert starts() == 1
    assert end(wire) == int(said.pop())


@pytest.mark.slow
def test_the_next_keeper_follows_one_that_was_killed(program) -> None:
    wire = ensure_keeper(spec(), program=program)
    first = number(wire, GetStatus())
    os.kill(first, signal.SIGKILL)
    assert wire.receive(20) is None
    wire.close()
    ends(first)
    assert JobFolder("/data/runs", "gpt").socket_path.is_socket()
    with pytest.raises(UnavailableError, match="no keeper listens"):
        ensure_keeper(spec(), start=False)
    wire = ensure_keeper(spec(), program=program)
    assert end(wire) != first


def test_a_keeper_below_a_long_path_is_found(program, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / ("long" * 30)))
    wire = ensure_keeper(spec(), program=program)
    end(wire)


def test_a_keeper_that_is_ending_is_waited_for(program) -> None:
    folder = JobFolder("/data/runs", "gpt")
    lock = folder.try_lock()
    assert lock is not None
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ensure_keeper, spec(), program=program)
        assert not found.done()
        os.close(lock)
        wire = found.result(30)
    assert starts() == 1
    end(wire)


@pytest.mark.slow
def test_a_keeper_that_fails_is_given_up_with_what_it_said(program) -> None:
    JobFolder("/data/runs", "broken").try_lock(name="made")
    JobFolder("/data/runs", "broken").log_path.write_text("of an earlier keeper\n")
    with pytest.raises(UnavailableError, match=r"(?s)status 1.*no memory for this") as caught:
        ensure_keeper(spec("broken"), program=program)
    assert "earlier" not in str(caught.value)
    assert starts("broken") == client.FAILS_MAX


def test_a_lock_whose_holder_never_listens_is_given_up_in_time(program) -> None:
    lock = JobFolder("/data/runs", "gpt").try_lock()
    assert lock is not None
    with pytest.raises(UnavailableError, match="holds the job's lock"):
        ensure_keeper(spec(), program=program, wait_s=0.1)
    os.close(lock)


@pytest.mark.slow
def test_a_keeper_that_never_listens_is_ended_in_time(program) -> None:
    with pytest.raises(UnavailableError, match="didn't listen in time"):
        ensure_keeper(spec("deaf"), program=program, wait_s=0.5)
    assert not JobFolder("/data/runs", "deaf").has_keeper()


def test_the_keeper_imports_this_package_first(monkeypatch) -> None:
    home = str(Path(client.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert client._environment()["PYTHONPATH"] == f"{home}:/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert client._environment()["PYTHONPATH"] == home
    monkeypatch.setattr(client.site, "getsitepackages", lambda: [home])
    assert "PYTHONPATH" not in client._environment()


@pytest.mark.parametrize("value", [object(), {1, 2}, (1, 2), b"raw", float("nan"), {1: "x"}])
def test_storage_options_that_cannot_travel_are_named(value: object) -> None:
    with pytest.raises(UsageError, match="storage options can't be handed"):
        KeeperSpec(job="j", store="/s", storage_options={"hook": value}).encode()


def test_a_specification_reads_back() -> None:
    assert KeeperSpec.decode(spec().encode()) == spec()
    assert KeeperSpec.decode(KeeperSpec(job="j", store="/s").encode()).storage_options is None
    with pytest.raises(UsageError, match="not a keeper's specification"):
        KeeperSpec.decode(b"{}")


# ---- the hello

HELLO = Hello(id=1, version=1, role="supervisor", pid=1)


class Endings:
    """Keepers that answer each connection with the next of some words; None hangs up."""

    def __init__(self, *answers: Message | None) -> None:
        self.left = list(answers)
        self._ends: list[socket.socket] = []

    def connect(self) -> MessageSocket:
        """A connection whose hello is answered already."""
        ours, theirs = socket.socketpair()
        answer = self.left.pop(0)
        if answer is None:
            theirs.close()
        else:
            self._ends.append(theirs)
            MessageSocket(theirs).send(answer)
        return MessageSocket(ours)

    def close(self) -> None:
        """Hang up on those that were answered."""
        for end in self._ends:
            end.close()


@pytest.fixture
def endings() -> Iterator[Callable[..., Endings]]:
    made: list[Endings] = []

    def make(*answers: Message | None) -> Endings:
        made.append(Endings(*answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


WELCOME = Welcome(id=1, boot="b", pid=2, attempt=3)


def test_a_keeper_that_is_just_ending_is_followed_by_the_next(
    endings, no_descriptor_is_left_open
) -> None:
    keepers = endings(None, None, WELCOME)
    wire, welcome = connect_with_hello(keepers.connect, HELLO)
    assert welcome == WELCOME
    assert keepers.left == []
    wire.close()
    keepers.close()


def test_keepers_that_all_hang_up_are_given_up(endings, no_descriptor_is_left_open) -> None:
    with pytest.raises(HungUpError, match=r"hung up|no answer"):
        connect_with_hello(endings(None, None).connect, HELLO, wait_s=0.0)


def test_what_a_keeper_has_against_a_peer_is_raised_at_once(
    endings, no_descriptor_is_left_open
) -> None:
    refused = Done(id=1, error=RemoteError("unavailable", "still at it", -1))
    keepers = endings(refused, WELCOME)
    with pytest.raises(UnavailableError, match="still at it") as caught:
        connect_with_hello(keepers.connect, HELLO)
    assert not isinstance(caught.value, HungUpError)
    assert keepers.left == [WELCOME]
    keepers.close()


def test_another_answer_than_a_welcome_is_a_bug(endings) -> None:
    wire = endings(Number(id=1, number=3)).connect()
    with pytest.raises(InternalError):
        exchange_hello(wire, HELLO)
    wire.close()


def test_settings_have_equal_digests_only_if_they_lead_to_the_same_stores_in_the_same_way(
    tmp_path: Path,
) -> None:
    one = KeeperSpec(job="j", store="s3://bucket/run")
    assert one.stores_digest() == KeeperSpec.decode(one.encode()).stores_digest()
    for other in (
        replace(one, others=("/b",)),
        replace(one, write_quorum=1),
        replace(one, encryption_key="env:K"),
    ):
        assert other.stores_digest() != one.stores_digest()
    for other in (
        replace(one, storage_options={"endpoint_url": "http://live"}),
        replace(one, compression="off"),
        replace(one, nodes=NodesSpec(where="/f", job="j", nodes_min=1, nodes_max=2)),
    ):
        assert other.access_digest({}) != one.access_digest({})
        assert other.access_digest({}) == KeeperSpec.decode(other.encode()).access_digest({})
    before = {"AWS_SECRET_ACCESS_KEY": "old", "PATH": "/bin", "AWS_CONFIG_FILE": "/none"}
    assert one.access_digest(before) == one.access_digest({**before, "PATH": "/usr/bin"})
    assert one.access_digest(before) != one.access_digest(
        {**before, "AWS_SECRET_ACCESS_KEY": "new"}
    )
    local = replace(one, store="/run")
    assert local.access_digest(before) == local.access_digest({}), "no credentials are used there"
    file = tmp_path / "credentials"
    named = {**before, "AWS_SHARED_CREDENTIALS_FILE": str(file)}
    file.write_text("old")
    digest = one.access_digest(named)
    file.write_text("new")
    assert one.access_digest(named) != digest
    agents = [NodesSpec(where="/f", job="j", nodes_min=1, nodes_max=2, agent=a) for a in "xy"]
    assert len({replace(one, nodes=nodes).access_digest({}) for nodes in agents}) == 1


def test_key_that_a_variable_or_file_holds_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("1")
    one = KeeperSpec(job="j", store="/run", encryption_key=f"env:RUN_KEY,file:{file}")
    digest = one.access_digest({"RUN_KEY": "1"})
    assert one.access_digest({"RUN_KEY": "2"}) != digest
    file.write_text("2")
    assert one.access_digest({"RUN_KEY": "1"}) != digest


@pytest.mark.parametrize(
    "name", ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS"]
)
def test_credentials_at_a_relative_path_are_the_same_file_to_the_keeper(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "credentials")
    one = KeeperSpec(job="j", store="s3://bucket/run")
    digest, handed = one.access_digest(), client._environment()
    assert Path(handed[name]).read_text() == "secret"
    monkeypatch.chdir("/")
    assert one.access_digest(handed) == digest
    (tmp_path / "credentials").write_text("another")
    assert one.access_digest(handed) != digest


def test_relative_path_in_a_working_folder_that_is_gone_keeps_nothing_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("AWS_CONFIG_FILE", "config")
    one = KeeperSpec(job="j", store="s3://bucket/run")
    digest, handed = one.access_digest(), client._environment()
    monkeypatch.chdir(tmp_path)
    assert one.access_digest(handed) == digest
