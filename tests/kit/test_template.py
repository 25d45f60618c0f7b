"""Forked programs are what started ones are, as far as a test can see from outside and a program
from inside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import template
from kit.template import Program, run

WAIT_S = 60

Start = Callable[..., subprocess.CompletedProcess[str]]

STANDING = """
import atexit, json, os, random, signal, sys, threading, warnings
import numpy, torch
def end(of): return open(f"/proc/self/{of}", "rb").read().decode(errors="replace")
print(json.dumps({
    "argv": sys.argv, "words": sys.orig_argv, "path": sys.path, "cwd": os.getcwd(), "name": __name__,
    "file": globals().get("__file__"), "spec": getattr(globals().get("__spec__"), "name", None),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "command": end("cmdline"), "environ": sorted(end("environ").split("\\0")),
    "parent": os.getppid(), "own session": os.getsid(0) == os.getpid(), "group": os.getpgrp() == os.getpid(),
    "threads": len(threading.enumerate()), "native": len(os.listdir("/proc/self/task")),
    "descriptors": sorted(int(one) for one in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{one}")),
    "signals": [str(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP)],
    "mask": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "umask": os.umask(0), "torch threads": torch.get_num_threads(),
    "random": [torch.rand(2).tolist(), float(numpy.random.rand()), random.random()],
    "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.write_through],
    "warnings": [one[:3] for one in map(str, warnings.filters) if "site" in one],
    "children": end(f"task/{os.getpid()}/children"),
}))
"""
ENDS = {
    "falls off": "print('said')",
    "status": "import sys; sys.exit(7)",
    "large status": "import sys; sys.exit(258)",
    "text": "import sys; print('said'); sys.exit('no data')",
    "exception": "def f():\n    raise ValueError('bad batch')\nf()",
    "syntax": "for",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "thread": "import threading as t, time; t.Thread(target=lambda: (time.sleep(0.1), print('late'))).start(); print('said')",
    "exit functions": "import atexit; atexit.register(print, 'first'); atexit.register(print, 'second'); 1 / 0",
    "own hook": "import sys; sys.excepthook = lambda *what: print('hooked', what[0]); 1 / 0",
    "broken pipe": "import os, sys; os.close(1); print('lost')",
}

pytestmark = pytest.mark.skipif(template.REAL, reason="all programs are started for real here")


def real(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=WAIT_S, **how
    )


def forked(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    return run(command, capture_output=True, text=True, timeout=WAIT_S, **how)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["script", "module", "command"])
@pytest.mark.parametrize("new_session", [True, False])
def test_program_finds_itself_as_a_started_one_does(
    kind: str, new_session: bool, tmp_path: Path
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "program.py").write_text(STANDING)
    words = {
        "script": ["below/program.py"],
        "module": ["-m", "below.program"],
        "command": ["-c", STANDING],
    }[kind]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path / "elsewhere"),
        "OMP_NUM_THREADS": "1",
        "MINE": "ä\udcff",
    }
    found = []
    for start in (real, forked):
        done = start(
            [sys.executable, *words, "one", "", "--two"],
            env=environment,
            cwd=tmp_path,
            start_new_session=new_session,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0].pop("random") != found[1].pop("random")
    native = [one.pop("native") for one in found]
    assert native[1] <= native[0], "numpy's BLAS has threads of its own"
    assert found[0]["parent"] == os.getpid()
    assert found[1] == found[0]


@pytest.mark.slow
@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS.keys())
def test_program_ends_as_a_started_one_does(program: str) -> None:
    ends = [start([sys.executable, "-c", program]) for start in (real, forked)]
    first, second = [
        (done.returncode, done.stdout, done.stderr.replace("<stdout>", "")) for done in ends
    ]
    assert second == first


@pytest.mark.slow
def test_modules_note_nothing_of_the_template_at_their_import(tmp_path: Path) -> None:
    """Else a program would go on with it. What depends on where it was started is what it is in a
    started one."""
    program = """
import json, pkgutil, sys
import ckpt, ckpt.cli.main, ckpt.elastic.processes.enter, ckpt.session.keeper.attachment
for name in ckpt.__all__: getattr(ckpt, name)
plain = (str, int, float, bool, bytes, tuple, frozenset, type(None))
def text(value): return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
print(json.dumps({
    name: {key: text(one) for key, one in vars(module).items() if isinstance(one, plain) and " at 0x" not in repr(one)}
    for name, module in sorted(sys.modules.items()) if name.startswith("ckpt.")
}))
"""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "CKPT_RUNTIME_DIR": str(tmp_path),
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "CKPT_STATE_DIR": str(tmp_path),
        "CKPT_IN_PLACE": "1",
    }
    first, second = (
        json.loads(start([sys.executable, "-c", program], env=environment, cwd=tmp_path).stdout)
        for start in (real, forked)
    )
    assert {name: second[name] for name in first} == first


@pytest.mark.slow
def test_program_is_talked_to_signalled_and_waited_for() -> None:
    code = "import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)"
    with Program(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("word\n")
        process.stdin.flush()
        assert process.stdout.readline() == "WORD\n"
        assert process.poll() is None
        process.terminate()
        assert process.wait(WAIT_S) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    with pytest.raises(subprocess.CalledProcessError):
        run([sys.executable, "-c", "1 / 0"], capture_output=True, check=True)


@pytest.mark.slow
def test_program_leads_its_session_and_has_its_descriptors_as_soon_as_it_is_there() -> None:
    read, write = os.pipe()
    code = f"import os, time; os.write({write}, b'here'); time.sleep(60)"
    process = Program([sys.executable, "-c", code], start_new_session=True, pass_fds=[write])
    try:
        assert os.getsid(process.pid) == process.pid
        os.close(write)
        assert os.read(read, 9) == b"here"
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(WAIT_S) == -signal.SIGKILL
        assert os.read(read, 9) == b"", "nobody else has it"
    finally:
        os.close(read)
        process.kill()


@pytest.mark.slow
def test_orphans_of_a_program_are_not_left_to_the_test() -> None:
    code = "import os\nif os.fork(): os._exit(0)\nwhile os.getppid() == {}: pass\nprint(os.getppid() == {}, flush=True)"
    done = forked(
        [
            sys.executable,
            "-c",
            "import os\nme = os.getpid()\n" + code.replace("{}", "me", 1).format(os.getpid()),
        ]
    )
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_workers_of_torchrun_are_its_children_and_lead_sessions(tmp_path: Path) -> None:
    """And what becomes of them is what becomes of started ones."""
    (tmp_path / "worker.py").write_text(
        "import json, os, sys, threading, time\n"
        "rank, folder = int(os.environ['RANK']), sys.argv[1]\n"
        "facts = [os.getppid(), os.getsid(0) == os.getpid(), len(threading.enumerate()), "
        "sys.orig_argv[1:],\n"
        "  sorted(int(one) for one in os.listdir('/proc/self/fd') if "
        "os.path.exists(f'/proc/self/fd/{one}'))]\n"
        "os.write(1, f'rank {rank}\\n'.encode())\n"  # at once: two ranks share the pipe
        "open(f'{folder}/{rank}.json', 'w').write(json.dumps(facts))\n"
        "while rank == 1 and not os.path.exists(f'{folder}/said'): time.sleep(0.01)\n"
        "if rank == 1: raise SystemExit(5)\n"
        "open(f'{folder}/said', 'w').close()\n"
        "time.sleep(60)\n"
    )
    ends = []
    for number, start in enumerate((subprocess.Popen, Program)):
        out = tmp_path / str(number)
        out.mkdir()
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "worker.py",
            str(out),
        ]
        with start(
            [sys.executable, *command],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        ) as agent:
            said, _ = agent.communicate(timeout=WAIT_S)
        facts = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
        assert [one.pop(0) for one in facts] == [agent.pid] * 2
        assert [one[2].pop() for one in facts] == [str(out)] * 2
        ends.append(
            (
                agent.returncode,
                facts,
                sorted(line for line in said.splitlines() if line.startswith("rank")),
            )
        )
        assert "exitcode  : 5" in said
    assert ends[1] == ends[0]


@pytest.mark.slow
def test_template_ends_with_the_process_that_asks_it(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(template.__file__).parents[1])!r})\n"
        "import os, signal; from kit.template import here\n"
        f"open({str(said)!r}, 'w').write(str(here()._process.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert real([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    until_s = time.monotonic() + WAIT_S
    while Path(f"/proc/{said.read_text()}").exists():
        assert time.monotonic() < until_s, "it goes on"
        time.sleep(0.01)
