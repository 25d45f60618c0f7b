"""A supervisor whose trainers are spawned keeps nothing of what the program built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
import torch, ckpt

heard = []
signal.signal(signal.SIGHUP, lambda *_: heard.append("hup"))
built = torch.ones(48 << 20, dtype=torch.uint8)
threading.Thread(target=threading.Event().wait, daemon=True, name="above").start()
sys.path.append(Path("no-text"))  # imports pass over it
Path("elsewhere").mkdir(exist_ok=True)
Path("elsewhere/json.py").write_text("raise SystemExit('the module of a folder')")

@ckpt.resilient(store=sys.argv[1], job="thin", every="1h")
def train(run):
    model = torch.nn.Linear(4, 4)
    run.track(model=model)
    for step in run.steps(6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        if step == 3 and run.restored is None:
            os.kill(os.getpid(), signal.SIGKILL)
    parent = Path(f"/proc/{os.getppid()}")
    fields = dict(line.split(":", 1) for line in (parent / "status").read_text().splitlines())
    print("supervisor", int(fields["RssAnon"].split()[0]), int(fields["Threads"]), flush=True)
    print("command", (parent / "cmdline").read_bytes().decode().split("\\0")[-3:-1], flush=True)
    fds = [fd for of in (parent, Path("/proc/self")) for fd in (of / "fd").iterdir()]
    print("plans", sum("ckpt-supervisor" in os.path.realpath(fd) for fd in fds), flush=True)
    os.kill(os.getppid(), signal.SIGHUP)  # it passes on what the program handles
    while "hup" not in heard:
        time.sleep(0.01)
    return run.completed_steps

os.chdir("elsewhere")
print("ended", train(), flush=True)
"""


def start(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    (tmp_path / "train.py").write_text(PROGRAM)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPT_")}
    (tmp_path / "run").mkdir(mode=0o700, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=tmp_path,
        env={**kept, "CKPT_RUNTIME_DIR": str(tmp_path / "run"), "CKPT_STATE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_supervisor_of_spawned_trainers_drops_what_the_program_built(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with start(tmp_path, store) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "ended 6" in output, output
    assert "1 failed: rank 0 died of SIGKILL" in output, output
    (facts,) = (line.split() for line in output.splitlines() if line.startswith("supervisor"))
    anonymous_kib, threads = map(int, facts[1:])
    assert anonymous_kib < 40 << 10, "torch alone takes more, and the program built 48 MiB"
    assert threads == 1
    assert "plans 0" in output, output
    assert f"command ['train.py', '{store}']" in output, "pkill -f finds it"
