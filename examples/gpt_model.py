"""A small byte-level GPT, and the text that it learns: the sources of Python's own standard
library."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the model and its batches are. ``batch`` counts the windows of all ranks
    together."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int


SHAPES = {
    "tiny": Shape(layers=2, heads=4, width=64, context=64, batch=12),
    "small": Shape(layers=4, heads=8, width=256, context=128, batch=24),
    "base": Shape(layers=12, heads=12, width=768, context=256, batch=48),
}


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, both behind a layer norm."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = nn.Linear(shape.width, 3 * shape.width)
        self.projection = nn.Linear(shape.width, shape.width)
        self.feed_norm = nn.LayerNorm(shape.width)
        self.feed = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.attention(self.attention_norm(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.feed_norm(x))


class GPT(nn.Module):
    """Maps bytes (batch, length) to the loss of predicting ``targets``, a scalar in nats per byte.

    Dropout is on, so a run continues bit for bit only where the random state came back too.
    """

    def __init__(self, shape: Shape, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape, dropout) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.norm(self.blocks(self.tokens(inputs) + self.positions(places)))
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def read_corpus(*, bytes_max: int = 4 << 20) -> torch.Tensor:
    """The standard library's top-level modules in name order, as one uint8 tensor of at most
    ``bytes_max`` bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise SystemExit(
            "this Python carries no library sources to train on; use a regular installation"
        )
    text = bytearray()
    for file in files:
        text += file.read_bytes()
        if len(text) >= bytes_max:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:bytes_max]


class Windows:
    """Cuts the corpus into windows and deals them out in a seeded random order, each once per pass.

    One global sequence of windows exists, whatever the number of ranks: a step takes the next
    ``batch`` of them, and rank r gets every ``world_size``-th, from r on. All that must be
    remembered is how many were dealt, so every rank's state is the same, and a run resumed in a
    world of another size neither repeats nor drops a window.
    """

    def __init__(
        self, corpus: torch.Tensor, shape: Shape, *, rank: int, world_size: int, seed: int
    ) -> None:
        if shape.batch % world_size != 0:
            raise SystemExit(
                f"the batch does not divide among the ranks. batch={shape.batch} ranks={world_size}"
            )
        self.windows = (len(corpus) - 1) // shape.context
        if self.windows < shape.batch:
            raise SystemExit(
                f"the corpus is too short for one batch. windows={self.windows} batch={shape.batch}"
            )
        self.corpus, self.shape, self.rank, self.world_size, self.seed = (
            corpus,
            shape,
            rank,
            world_size,
            seed,
        )
        self.dealt = 0
        self._order = (-1, torch.empty(0, dtype=torch.long))

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch of this rank: inputs and targets, int64, (batch / world_size, context)
        each."""
        numbers = range(self.dealt + self.rank, self.dealt + self.shape.batch, self.world_size)
        self.dealt += self.shape.batch
        starts = [self._window(number) * self.shape.context for number in numbers]
        rows = torch.stack(
            [self.corpus[start : start + self.shape.context + 1] for start in starts]
        ).long()
        return rows[:, :-1], rows[:, 1:]

    def _window(self, number: int) -> int:
        lap, place = divmod(number, self.windows)
        if self._order[0] != lap:
            self._order = (
                lap,
                torch.randperm(
                    self.windows, generator=torch.Generator().manual_seed(self.seed + lap)
                ),
            )
        return int(self._order[1][place])

    def state_dict(self) -> dict[str, int]:
        return {"dealt": self.dealt, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.dealt, self.seed = state["dealt"], state["seed"]
        self._order = (-1, self._order[1])


def learning_rate_factor(step: int, *, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))
