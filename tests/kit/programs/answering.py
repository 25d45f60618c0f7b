"""A served model whose every reply can be compared with what its generation must answer.

All parameters of a generation are its step, so a reply that mixes two generations shows both.
"""

from __future__ import annotations

import os
import time

import torch
from torch import nn

import ckpt.serve

WIDTH = int(os.environ.get("ANSWERING_WIDTH", "64"))


def make_model() -> nn.Module:
    """The model that the trainer tracks as ``model``."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))


replica = ckpt.serve.Replica(
    os.environ.get("ANSWERING_STORE", "store"), into=make_model, poll_s=0.05
)


def answer(request: ckpt.serve.ModelRequest) -> object:
    """The values of all parameters, before and after the model was used."""
    before = values(request.model)
    output = request.model(torch.ones(1, WIDTH))
    time.sleep(float(request.query.get("sleep", 0)))
    after = values(request.model)
    return {
        "step": request.generation.step,
        "values": sorted(before | after),
        "output": output.tolist(),
        "body": request.body.decode(),
        "pid": os.getpid(),
    }


def values(model: nn.Module) -> set[float]:
    """The different numbers that its parameters have."""
    return {
        float(value)
        for parameter in model.parameters()
        for value in (parameter.min(), parameter.max())
    }


replica.get("/answer")(answer)
replica.post("/answer", repeatable=True)(answer)
replica.post("/once")(answer)


@replica.post("/fail")
def fail(request: ckpt.serve.ModelRequest) -> object:
    """Fail as the query says."""
    match request.query.get("how"):
        case "usage":
            raise ckpt.UsageError("a number is missing")
        case "json":
            return request.json()
        case "text":
            return "text"
        case "bytes":
            return b"\0\1"
        case _:
            raise RuntimeError("broken on purpose")
