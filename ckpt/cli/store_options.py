"""Arguments and options that commands share: stores, snapshots and rate limits."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.backends.encrypted.keys import load_keys
from ckpt.backends.encrypted.open import encrypted, require_matching_keys
from ckpt.backends.objects.fsspec_store import StorageOptions
from ckpt.backends.replicated.open import (
    KEY_VARIABLE,
    key_source,
    open_job_stores,
    open_stores,
    require_key_fits,
)
from ckpt.cli.echo import JsonValue, wants_json, warn
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.log.catalog import select
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.rate_limit import parse_rate
from ckpt.values import SnapshotId, SnapshotInfo

Result = int | None
"""A command's exit code; None is 0."""


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """Which stores a command works on, and how it prints. ``url`` is the first of them."""

    url: str
    storage_options: tuple[str, ...]
    as_json: bool
    replicas: tuple[str, ...] = ()
    write_quorum: int | None = None
    encryption_key: str | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """All stores."""
        return (self.url, *self.replicas)


@dataclass(frozen=True, slots=True)
class Selector:
    """The snapshot that the user named; without a name, the newest."""

    step: int | None
    epoch: int | None
    tag: str | None

    @property
    def empty(self) -> bool:
        """Whether no snapshot was named."""
        return self.step is None and self.epoch is None and self.tag is None


@dataclass(frozen=True, slots=True)
class OpenStore:
    """An open store: where its bytes are, its log, and the log's fold as it was when the command
    began."""

    backend: Backend
    journal: Journal
    state: LogState

    def select(self, selector: Selector) -> SnapshotId:
        """The snapshot that ``selector`` names. Raises NotFoundError or UsageError."""
        return select(self.state, step=selector.step, epoch=selector.epoch, tag=selector.tag)

    def tags_of(self, snapshot: SnapshotId) -> tuple[str, ...]:
        """The snapshot's tags, by name."""
        return tuple(name for name, named in self.state.tags.items() if named == snapshot)


def store_command(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command the store's URL, the options of stores, ``--json`` and ``--debug``; it gets
    them as a StoreChoice."""

    @click.argument("url")
    @click.option(
        "--replica",
        "replicas",
        multiple=True,
        metavar="URL",
        help="Another store of the same job; may be repeated. Name all of them to write, enough "
        "to know what is newest.",
    )
    @click.option(
        "--write-quorum",
        type=click.IntRange(min=1),
        help="Of how many stores a record needs (default: the majority).",
    )
    @click.option(
        "--encryption-key",
        metavar="WHERE",
        envvar=KEY_VARIABLE,
        help="Where the key is: file:PATH, env:NAME or command:WORDS.",
    )
    @click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the store's file system; may be repeated. VALUE is JSON, or else text. "
        "N:KEY=VALUE is for the N-th "
        "store alone, from 1.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
    @click.option(
        "--debug", is_flag=True, expose_value=False, help="Print the traceback of an error."
    )
    @click.pass_context
    @functools.wraps(function)
    def command(
        ctx: click.Context,
        /,
        *,
        url: str,
        storage_options: tuple[str, ...],
        as_json: bool,
        replicas: tuple[str, ...],
        write_quorum: int | None,
        encryption_key: str | None,
        **others: object,
    ) -> Result:
        choice = StoreChoice(
            url,
            storage_options,
            wants_json(ctx, as_json),
            replicas=replicas,
            write_quorum=write_quorum,
            encryption_key=encryption_key,
        )
        return function(choice, **others)

    return command


def snapshot_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command ``--step``, ``--epoch`` and ``--tag``; it gets them as the keyword
    ``selector``."""

    @click.option(
        "--step",
        type=click.IntRange(min=0),
        help="The snapshot of this step; the newest one that has it.",
    )
    @click.option(
        "--epoch",
        type=click.IntRange(min=0),
        help="The captured epoch; alone: its newest snapshot.",
    )
    @click.option("--tag", help="The snapshot with this tag.")
    @functools.wraps(function)
    def command(
        *args: object, step: int | None, epoch: int | None, tag: str | None, **others: object
    ) -> Result:
        if tag is not None and (step is not None or epoch is not None):
            raise UsageError(
                "a snapshot is named by its tag or by its step and epoch, not both. leave one out"
            )
        return function(*args, selector=Selector(step, epoch, tag), **others)

    return command


@contextmanager
def open_store(choice: StoreChoice) -> Iterator[OpenStore]:
    """Open the stores, fold their log, and close them afterwards.

    Warns if the newest snapshot cannot be known. Raises NotFoundError if there is no store.
    """
    options = options_of(choice.storage_options, stores=len(choice.urls))
    backend = open_job_stores(
        choice.urls,
        options,
        write_quorum=choice.write_quorum,
        encryption_key=choice.encryption_key,
        emit=warn_on_alarm,
    )
    try:
        require_key_fits(backend, choice.encryption_key)
        journal = Journal.open(backend)
        state = journal.refresh()
        if state.hole is not None:
            warn(
                f"the log has a hole, so what is newest cannot be known. seq={state.hole.seq} "
                f"reason={state.hole.reason}"
            )
        elif state.short:
            warn(f"what is newest cannot be known: {state.short}")
        yield OpenStore(backend, journal, state)
    finally:
        backend.close()


def parse_reference(state: LogState, text: str) -> SnapshotId:
    """The snapshot that ``text`` names: ``newest``, a step, ``epoch:step``, or a tag.

    Raises NotFoundError if there is none.
    """
    if text == "newest":
        return select(state)
    if text in state.tags:
        return select(state, tag=text)
    epoch, colon, step = text.rpartition(":")
    if step.isdecimal() and (epoch.isdecimal() or not colon):
        return select(state, step=int(step), epoch=int(epoch) if colon else None)
    raise NotFoundError(
        f"no such snapshot. name={text}; write a step, epoch:step, a tag, or 'newest'"
    )


def id_json(snapshot: SnapshotId) -> dict[str, JsonValue]:
    """A snapshot id as JSON."""
    return {"epoch": snapshot.epoch, "step": snapshot.step}


def info_json(info: SnapshotInfo, *, newest: bool, on_line: bool) -> dict[str, JsonValue]:
    """A snapshot's properties as JSON, the same in every command."""
    return {
        **id_json(info.id),
        "newest": newest,
        "on_line": on_line,
        "world_size": info.world_size,
        "size_bytes": info.size_bytes,
        "new_bytes": info.new_bytes,
        "created_unix_s": info.created_unix_s,
        "tags": list(info.tags),
        "metadata": dict(info.metadata),
        "problem": info.problem,
        "maybe_stale": info.maybe_stale,
    }


def options_of(texts: tuple[str, ...], *, stores: int) -> list[dict[str, object] | None]:
    """The storage options of each store.

    Raises UsageError for a text that is neither ``KEY=VALUE`` nor ``N:KEY=VALUE``.
    """
    options_by_store: list[dict[str, object]] = [{} for _ in range(stores)]
    for text in texts:
        numbers, key, value = _option(text, stores)
        for number in numbers:
            options_by_store[number][key] = value
    return [options or None for options in options_by_store]


def _option(text: str, stores: int) -> tuple[range, str, object]:
    name, equals, value = text.partition("=")
    number, colon, key = name.partition(":")
    numbers = range(stores)
    if colon and number.isdecimal():
        if not 1 <= int(number) <= stores:
            raise UsageError(
                f"a storage option is for a store that was not named. option={name} stores={stores}"
            )
        name, numbers = key, range(int(number) - 1, int(number))
    if not name or not equals:
        raise UsageError(f"a storage option is not KEY=VALUE. option={text}")
    try:
        return numbers, name, json.loads(value)
    except ValueError:
        return numbers, name, value


# ---- commands that take several stores one by one


@dataclass(frozen=True, slots=True)
class StoreList:
    """Which stores a command works on, and how it prints."""

    urls: tuple[str, ...]
    storage_options: tuple[str, ...]
    as_json: bool
    encryption_key: str | None = None
    write_quorum: int | None = None

    @property
    def options(self) -> list[dict[str, object] | None]:
        """The storage options of each store. Raises UsageError for a malformed one."""
        return options_of(self.storage_options, stores=len(self.urls))


def urls_command(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command ``URL...``, the store options, ``--json`` and ``--debug``, as a StoreList."""

    @click.argument("urls", metavar="URL...", nargs=-1, required=True)
    @click.option(
        "--write-quorum",
        type=click.IntRange(min=1),
        help="On how many stores an object must be (default: the majority).",
    )
    @common_options
    @functools.wraps(function)
    def command(
        *, urls: tuple[str, ...], write_quorum: int | None, options: CommonOptions, **others: object
    ) -> Result:
        choice = StoreList(
            urls, options.storage_options, options.as_json, options.encryption_key, write_quorum
        )
        return function(choice, **others)

    return command


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """The options of stores beside their URLs, and the output format."""

    storage_options: tuple[str, ...]
    encryption_key: str | None
    as_json: bool


def common_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command the store options; it gets the keyword ``options``, a CommonOptions."""

    @click.option(
        "--encryption-key",
        metavar="WHERE",
        help="Where the key is: file:PATH, env:NAME or command:WORDS.",
    )
    @click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the store's file system; may be repeated. VALUE is JSON, or else text. "
        "N:KEY=VALUE is for the N-th "
        "store alone, from 1.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
    @click.option(
        "--debug", is_flag=True, expose_value=False, help="Print the traceback of an error."
    )
    @click.pass_context
    @functools.wraps(function)
    def command(
        ctx: click.Context,
        /,
        *,
        storage_options: tuple[str, ...],
        encryption_key: str | None,
        as_json: bool,
        **others: object,
    ) -> Result:
        return function(
            options=CommonOptions(storage_options, encryption_key, wants_json(ctx, as_json)),
            **others,
        )

    return command


def rate_option(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command ``--rate``; it gets the keyword ``rate_bytes_per_s``."""

    @click.option(
        "--rate",
        metavar="SIZE",
        help="Read and write no more than this in a second, such as 50MiB.",
    )
    @functools.wraps(function)
    def command(*args: object, rate: str | None, **others: object) -> Result:
        return function(
            *args, rate_bytes_per_s=None if rate is None else parse_rate(rate), **others
        )

    return command


@contextmanager
def open_plain_stores(
    urls: Sequence[str],
    options: Sequence[StorageOptions | None],
    *,
    encryption_key: str | None,
    write_quorum: int | None = None,
) -> Iterator[Backend]:
    """Open stores as one backend, and close it afterwards. They may be empty or hold other data.

    ``options``: each store's. Raises UsageError if a store is encrypted and no key is given, or the
    other way round: all its objects would look damaged.
    """
    source = key_source(encryption_key)
    keys = load_keys(source) if source is not None else None
    bare = open_stores(list(urls), list(options), write_quorum=write_quorum, emit=warn_on_alarm)
    try:
        for store in stores_of(bare):
            try:
                require_matching_keys(store, keys)
            except (UnavailableError, NotFoundError, IntegrityError):
                continue  # the command itself reports what is wrong with the store
        yield encrypted(bare, keys) if keys is not None else bare
    finally:
        bare.close()


def warn_on_alarm(event: Event) -> None:
    """Print alarms as warnings to stderr; an ``Emit``."""
    if event.alarm:
        warn(event.text)
