"""A model and the requests that it answers, as a program declares them.

    replica = ckpt.serve.Replica("s3://bucket/run", into=make_model, follow="tag:prod")

    @replica.post("/predict", repeatable=True)
    def predict(request):
        return request.model(torch.tensor(request.json())).tolist()

Declaring starts nothing. ``ckpt serve app:replica`` starts processes that each load the program and
serve what it declares.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from ckpt.errors import UsageError
from ckpt.events import Emit
from ckpt.serve.follower import Follower
from ckpt.serve.generations import Generation
from ckpt.session.options import StoreArgument

RESERVED = "/ckpt/"
"""Paths below it are the framework's own."""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One request and the generation that answers it, pinned for as long as its handler runs."""

    generation: Generation
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def model(self) -> torch.nn.Module:
        """The model of the generation; it must not be changed."""
        return self.generation.model

    def json(self) -> object:
        """The body as JSON. Raises UsageError, which is answered with 400."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise UsageError(f"the body is no JSON. path={self.path} why={error}") from error


Handler = Callable[[ModelRequest], object]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """A handler and what it takes. ``repeatable``: a request whose answer got lost may be computed
    again by another replica."""

    method: str
    path: str
    handler: Handler
    repeatable: bool


class Replica:
    """What each replica of a group holds and answers.

    The arguments are those of ``Follower``; ``follow`` counts until an operator orders something
    else. Replicas of one machine share their reads unless ``share_reads=False``. ``check`` runs on
    each generation before it is served, on standbys too, so it can warm the model up.

    Raises UsageError for arguments that ``Follower`` does not know.
    """

    def __init__(self, store: StoreArgument, **options: object) -> None:
        given = {"share_reads": True, **options}
        own = sorted({"emit", "on_swap"} & options.keys())
        try:
            inspect.signature(Follower).bind(store, **given)
        except TypeError as error:
            raise UsageError(f"not arguments of a replica: {error}") from error
        if own:
            raise UsageError(f"the serving process sets these itself. arguments={own}")
        self._store = store
        self._options = given
        self._routes: dict[tuple[str, str], ModelRoute] = {}

    def post(self, path: str, *, repeatable: bool = False) -> Callable[[H], H]:
        """Answer POST requests at ``path`` by the decorated function, which gets a ModelRequest.

        It runs in a thread of a pool. It returns bytes, text, or anything that JSON has; UsageError
        is answered with 400, any other error with 500. ``repeatable``: see ModelRoute. Raises
        UsageError for a path that is taken or reserved.
        """
        return self._route("POST", path, repeatable)

    def get(self, path: str) -> Callable[[H], H]:
        """Answer GET requests; these are always repeatable. See ``post``."""
        return self._route("GET", path, True)

    def _route(self, method: str, path: str, repeatable: bool) -> Callable[[H], H]:
        if not path.startswith("/") or path.startswith(RESERVED):
            raise UsageError(
                f"a path begins with / and not with {RESERVED}, which is ckpt's own. path={path!r}"
            )
        if (method, path) in self._routes:
            raise UsageError(f"the path has a handler already. method={method} path={path}")

        def declare(handler: H) -> H:
            self._routes[method, path] = ModelRoute(method, path, handler, repeatable)
            return handler

        return declare

    @property
    def routes(self) -> Mapping[tuple[str, str], ModelRoute]:
        """The handlers, by method and path."""
        return self._routes

    def start(
        self, *, emit: Emit, on_swap: Callable[[Generation], object], follow: str | int | None
    ) -> Follower:
        """Start following, in the process that serves. ``follow``: instead of the declared one.

        Raises what ``Follower`` raises.
        """
        options = self._options if follow is None else {**self._options, "follow": follow}
        return Follower(self._store, **options, emit=emit, on_swap=on_swap)  # type: ignore[arg-type]
