"""A classifier of market headlines that trains on while it serves, and loses processes meanwhile.

    python examples/serve_sentiment.py

One process trains and commits, ``ckpt serve`` answers by the newest commit, and this one asks. In
the middle the trainer is killed, and a replica. No request fails, answers name their generation,
and they get better. By hand, in ``examples/``:

    python serve_sentiment.py --train &
    ckpt serve serve_sentiment:replica --replicas 2 --standby 1
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from torch import nn

import ckpt
import ckpt.serve

STORE = os.environ.get("SENTIMENT_STORE", "runs/sentiment")
PORT = int(os.environ.get("SENTIMENT_PORT", "8080"))
UP = ("soars", "beats", "record", "upgrade", "rally", "strong")
DOWN = ("falls", "misses", "recall", "downgrade", "selloff", "weak")
REST = ("bank", "chips", "oil", "quarter", "shares", "the", "outlook", "today", "analysts", "on")
WORDS = {word: number for number, word in enumerate((*UP, *DOWN, *REST))}
LENGTH = 6
DIES_IN_STEP = 200
QUESTIONS = 600


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(len(WORDS), 16), nn.Linear(16, 2))


def headline() -> tuple[str, int]:
    """A headline, and whether it is good news."""
    good = random.random() < 0.5
    words = [random.choice(REST) for _ in range(LENGTH - 1)] + [random.choice(UP if good else DOWN)]
    random.shuffle(words)
    return " ".join(words), int(good)


def encode(texts: list[str]) -> torch.Tensor:
    """Headlines of equal length as numbers of words."""
    return torch.tensor([[WORDS[word] for word in text.split()] for text in texts])


@ckpt.resilient(store=STORE, every="300ms")
def train(run: ckpt.Run, steps: int) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run.track(model=model, optimizer=optimizer)  # random generators are tracked by themselves
    for step in run.steps(steps):
        texts, labels = zip(*(headline() for _ in range(16)), strict=True)
        loss = nn.functional.cross_entropy(model(encode([*texts])), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        time.sleep(0.02)  # a step of a larger model
        if step == DIES_IN_STEP and run.restored is None:
            os.kill(os.getpid(), signal.SIGKILL)


replica = ckpt.serve.Replica(STORE, into=make_model)


@replica.post("/sentiment", repeatable=True)
def sentiment(request: ckpt.serve.ModelRequest) -> object:
    """Good news (1) or bad (0), for each headline of a list."""
    texts = request.json()
    if not isinstance(texts, list) or not all(word in WORDS for t in texts for word in t.split()):
        raise ckpt.UsageError("send a list of headlines in words that were trained")
    return request.model(encode(texts)).argmax(1).tolist()


def ask(text: str) -> tuple[int, str]:
    """What a replica says of a headline, and by which generation."""
    body = json.dumps([text]).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/sentiment", body, timeout=60) as reply:
        return json.loads(reply.read())[0], reply.headers["X-Ckpt-Generation"]


def command(*words: str) -> list[str]:
    """A ``ckpt serve`` command line."""
    return [sys.executable, "-m", "ckpt", "--json", "serve", *words]


def pid_of_one() -> int:
    """The process of a replica that serves."""
    shown = subprocess.run(command("status"), capture_output=True, text=True, check=True)
    rows = json.loads(shown.stdout)["replicas"]
    return next(int(row["pid"]) for row in rows if row["role"] == "serving")


def main(folder: Path) -> None:
    """Train, serve, ask, kill a replica, and print what the answers were worth."""
    os.environ["SENTIMENT_STORE"] = str(folder / "store")
    here = Path(__file__).resolve()
    options = ("--replicas", "2", "--standby", "1", "--port", str(PORT))
    processes = [
        subprocess.Popen([sys.executable, str(here), "--train"], cwd=here.parent),
        subprocess.Popen(command("serve_sentiment:replica", *options), cwd=here.parent),
    ]
    right: list[bool] = []
    generations: set[str] = set()
    try:
        while socket.socket().connect_ex(("127.0.0.1", PORT)):
            time.sleep(0.1)  # once the front listens, requests wait for the first replica
        for number in range(QUESTIONS):
            text, good = headline()
            said, generation = ask(text)
            right.append(said == good)
            generations.add(generation)
            time.sleep(0.02)
            if number == QUESTIONS // 3:
                os.kill(pid_of_one(), signal.SIGKILL)
                print("killed a replica", flush=True)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
    print(f"{QUESTIONS} questions, all answered, by {len(generations)} generations")
    first, last = sum(right[:20]) / 20, sum(right[-20:]) / 20
    print(f"right: {first:.0%} of the first 20, {last:.0%} of the last")


if __name__ == "__main__":
    if "--train" in sys.argv:
        train(100_000)
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
