"""The template process: has imported what programs of tests import, has done nothing else, and
forks them.

A forked program differs from a started one in this: torch, ckpt and what they need are imported
already (a test of what is imported, or of the start of an interpreter, starts one for real); its
hash seed is the template's; numpy's BLAS has one thread; and it ends without taking the interpreter
down, which costs more than all the rest: threads are joined and exit functions run, then the
process is gone.

The process stays as it is after the imports: one thread, no parallel operation of torch, no GPU. So
a program decides on its own start (forked trainers or spawned ones) as a new one would.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import io
import mmap
import os
import runpy
import signal
import socket
import struct
import sys
import threading
import types
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NoReturn

sys.path[0] = str(Path(__file__).parents[1])
_PLAIN_FILTERS = len(warnings.filters)
_PLAIN_ENVIRONMENT = dict(os.environ)

# What programs import; the order is theirs.
import msgspec  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.distributed.run  # noqa: E402
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler  # noqa: E402

import ckpt  # noqa: E402
import ckpt.cli.main  # noqa: E402
import ckpt.elastic.processes.enter  # noqa: E402
import ckpt.session.keeper.attachment  # noqa: E402
from kit import orders, template  # noqa: E402
from kit.orders import Order  # noqa: E402

for _name in ckpt.__all__:
    getattr(ckpt, _name)

_ADDED_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in _PLAIN_ENVIRONMENT
}
"""What imports put there for those who look later."""

_PATH = sys.path[1:]
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.sbrk.restype = ctypes.c_void_p
_LIBC.sbrk.argtypes = [ctypes.c_ssize_t]


def serve(peer: socket.socket) -> Order | None:
    """Fork programs. Returns in each of them what it is to be, and in the template, once nobody
    asks any more, None."""
    while asked := orders.receive(peer):
        order, fds = asked
        number, says_number = os.pipe()
        leaves, says_leave = os.pipe()
        begins, says_begin = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork() == 0:
                for fd in (number, leaves, says_leave, says_begin):
                    os.close(fd)
                peer.close()
                _arrange(order, fds, says_number, begins)
                return order
            for fd in (says_number, says_leave):
                os.close(fd)
            os.read(leaves, 1)
            os._exit(0)
        for fd in (*fds, leaves, begins, says_number):
            os.close(fd)
        # It says its number when it is what was ordered, or dies.
        peer.sendall(os.read(number, orders.NUMBER_BYTES).rjust(orders.NUMBER_BYTES, b"\0"))
        orders.exactly(peer, 1)
        os.close(says_leave)
        os.waitpid(between, 0)
        peer.sendall(b"!")
        orders.exactly(peer, 1)
        os.close(says_begin)
        os.close(number)
    return None


def _arrange(order: Order, fds: Sequence[int], says_number: int, begins: int) -> None:
    """Everything of a process that a new program inherits or is given; then say its number and wait
    for its time."""
    if order.new_session:
        os.setsid()
    else:
        os.setpgid(0, order.group)
    says_number, begins = _place(fds, [0, 1, 2, *order.keep], [says_number, begins])
    if order.network:
        _enter(Path("/run/netns") / order.network)
    os.umask(order.umask)
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    _show(order.words, order.environment)
    os.write(says_number, os.getpid().to_bytes(orders.NUMBER_BYTES, "big"))
    os.close(says_number)
    os.read(begins, 1)
    os.close(begins)
    if os.getppid() != order.parent:
        os._exit(1)  # whoever asked is gone


def _place(fds: Sequence[int], numbers: Sequence[int], others: Sequence[int]) -> list[int]:
    """Give descriptors the numbers that they are to have and close the rest but ``others``, whose
    new numbers these are."""
    above = max(numbers) + 1
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in (*fds, *others)]
    for fd, number in zip(high, numbers, strict=False):
        os.dup2(fd, number, inheritable=True)
    others = high[len(fds) :]
    wanted = sorted([*numbers, *others])
    for number, next_one in zip(wanted, [*wanted[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(number + 1, next_one)
    return others


def _enter(network: Path) -> None:
    with network.open() as file:
        if _LIBC.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "this process cannot enter a network", str(network))


_shown: list[mmap.mmap] = []
"""The memory in which the system finds this process's command line and environment."""


def _show(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let ``/proc`` show this command line and this environment. Raises OSError where the system
    does not allow it."""
    command = b"".join(os.fsencode(word) + b"\0" for word in words)
    variables = b"".join(
        os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items()
    )
    memory = mmap.mmap(
        -1, len(command) + len(variables) + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    memory.write(command + variables)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _shown[:] = [memory]
    fields = [0, 0, *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]
    start_code, end_code, stack, start_data, end_data, heap = (
        int(fields[at]) for at in (25, 26, 27, 44, 45, 46)
    )
    ends = (
        begin,
        begin + len(command),
        begin + len(command),
        begin + len(command) + len(variables),
    )
    places = (start_code, end_code, start_data, end_data, heap, _LIBC.sbrk(0), stack, *ends)
    # struct prctl_mm_map: these addresses, then no auxiliary vector and no other executable.
    told = struct.pack("=11QQIi", *places, 0, 0, -1)
    if _LIBC.prctl(_PR_SET_MM, _PR_SET_MM_MAP, told, ctypes.c_ulong(len(told)), 0):
        raise OSError(ctypes.get_errno(), "this process cannot change what /proc shows of it")


def _launcher() -> Order | None:
    """Make this process one whose workers are forks, of a template of its own that has seen nothing
    of what it does.

    Gives an order in each worker; None in the launcher itself.
    """
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        os.setpgid(0, 0)
        fds = [os.open(os.devnull, os.O_RDWR)] * 3
        peer = socket.socket(fileno=_place(fds, [0, 1, 2], [theirs.detach()])[0])
        ours.detach()
        os.chdir("/")
        _show(["template"], {})  # nobody who looks for a test's processes means this one
        worker = serve(peer)
        if worker is None:
            os._exit(0)
        return worker
    theirs.close()
    template.use(template.Template(ours))
    subprocess_handler.Popen = template.Program
    return None


def _become(order: Order) -> NoReturn:
    """Run a program as its main module, and end as it ends."""
    torch_threads = order.environment.get("OMP_NUM_THREADS", "")
    if torch_threads.isdecimal():
        torch.set_num_threads(int(torch_threads))
    np.random.seed()  # random numbers of its own, whichever way they are made; Python sees to its own ones
    torch.default_generator.seed()
    for name, value in _ADDED_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for module in [one for name, one in sys.modules.items() if name.startswith("ckpt.")]:
        if hasattr(module, "STARTUP_FOLDER"):
            module.STARTUP_FOLDER = order.folder  # noted when it was imported
    sys.orig_argv = order.words
    options, words = _options(order.words)
    behind = order.environment.get("PYTHONPATH")
    sys.path[:] = [*(behind.split(os.pathsep) if behind else ()), *_PATH]
    _warnings(
        [
            *order.environment.get("PYTHONWARNINGS", "").split(","),
            *(one for one in options if one[0] != "-"),
        ]
    )
    _streams(unbuffered="-u" in options or bool(order.environment.get("PYTHONUNBUFFERED")))
    status, interrupted = 1, False
    try:
        _run_main(words)
        status = 0
    except SystemExit as error:
        status = _status(error)
    except BaseException as error:  # noqa: BLE001  as the interpreter does
        own = error.__traceback__
        while own is not None and own.tb_frame.f_code.co_filename == __file__:
            own = own.tb_next
        sys.excepthook(type(error), error.with_traceback(own), own)
        interrupted = isinstance(error, KeyboardInterrupt)
    _end(status, interrupted=interrupted)


def _options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the interpreter was told for itself, and the rest."""
    rest = orders.arguments_of(words)
    return list(words[1 : len(words) - len(rest)]), rest


def _warnings(options: Sequence[str]) -> None:
    """The filters of a new interpreter with these options, then those that imports added before
    them."""
    plain = len(warnings.filters) - _PLAIN_FILTERS
    added = warnings.filters[:plain]
    del warnings.filters[:plain]  # type: ignore[attr-defined]
    warnings._processoptions([one for one in options if one])  # type: ignore[attr-defined]
    warnings.filters[:0] = added  # type: ignore[index]
    with warnings.catch_warnings():  # which also says that they changed
        pass


def _streams(*, unbuffered: bool) -> None:
    """Standard streams over descriptors that are others' now."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if unbuffered:
            raw = io.FileIO(fd, "w", closefd=False)
            stream = io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True)  # type: ignore[arg-type]
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        else:
            stream.reconfigure(line_buffering=name == "stderr" or os.isatty(fd))


def _run_main(words: list[str]) -> None:
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={})
    sys.modules["__main__"] = main
    what, *arguments = words
    if what == "-m":
        sys.argv = ["-m", *arguments[1:]]
        sys.path.insert(0, str(Path.cwd()))
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
    elif what == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)  # noqa: S102
    else:
        path = Path.cwd() / what
        sys.argv = [what, *arguments]
        sys.path.insert(0, str(path.resolve().parent))
        loader = SourceFileLoader("__main__", str(path))
        main.__dict__.update(__file__=str(path), __loader__=loader, __cached__=None)
        exec(compile(path.read_bytes(), str(path), "exec"), main.__dict__)  # noqa: S102


def _status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _end(status: int, *, interrupted: bool) -> NoReturn:
    """As an interpreter: wait for threads, call exit functions, write what is buffered."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            status = 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def main() -> None:
    """Serve on the descriptor that the command names."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    os.setpgid(0, 0)  # whoever interrupts the test's processes means programs
    gc.collect()
    gc.freeze()
    order = serve(peer)
    while order is not None and order.launches:
        worker = _launcher()
        if worker is None:
            break
        order = worker
    if order is not None:
        _become(order)


if __name__ == "__main__":
    main()
