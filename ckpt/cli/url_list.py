"""What commands share that take several stores one by one: their URLs, their options, and how fast they may go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.backends.encrypted.keys import load_keys
from ckpt.backends.encrypted.open import encrypted, refuse_mismatch
from ckpt.backends.objects.fsspec_store import StorageOptions
from ckpt.backends.replicated.job import key_source
from ckpt.backends.replicated.open import open_stores
from ckpt.cli.echo import warn
from ckpt.cli.store_options import Result, options_of
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError
from ckpt.events import Event
from ckpt.rate_text import rate_of


@dataclass(frozen=True, slots=True)
class UrlList:
    """Which stores a command works on, and how it prints."""

    urls: tuple[str, ...]
    storage_options: tuple[str, ...]
    as_json: bool
    encryption_key: str | None = None
    write_quorum: int | None = None

    @property
    def options(self) -> list[dict[str, object] | None]:
        """The storage options of each store. Raises UsageError for what is none."""
        return options_of(self.storage_options, stores=len(self.urls))


def urls_command(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command ``URL...`` with the options of stores, ``--json`` and ``--debug``; it gets them as a UrlList."""

    @click.argument("urls", metavar="URL...", nargs=-1, required=True)
    @click.option(
        "--write-quorum",
        type=click.IntRange(min=1),
        help="On how many stores an object must be (default: the majority).",
    )
    @common_options
    @functools.wraps(function)
    def command(*, urls: tuple[str, ...], write_quorum: int | None, options: CommonOptions, **others: object) -> Result:
        choice = UrlList(urls, options.storage_options, options.as_json, options.encryption_key, write_quorum)
        return function(choice, **others)

    return command


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """What is said of stores beside their URLs."""

    storage_options: tuple[str, ...]
    encryption_key: str | None
    as_json: bool


def common_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command what is said of stores beside their URLs; it gets it as the keyword ``options``."""

    @click.option("--encryption-key", metavar="WHERE", help="Where the key is: file:PATH, env:NAME or command:WORDS.")
    @click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the store's file system; may be repeated. VALUE is JSON, or else text. N:KEY=VALUE is for the N-th "
        "store alone, from 1.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
    @click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
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
        anywhere = as_json or bool(ctx.find_root().params.get("as_json"))
        return function(options=CommonOptions(storage_options, encryption_key, anywhere), **others)

    return command


def rate_option(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command ``--rate``; it gets the keyword ``rate_bytes_per_s``."""

    @click.option("--rate", metavar="SIZE", help="Read and write no more than this in a second, such as 50MiB.")
    @functools.wraps(function)
    def command(*args: object, rate: str | None, **others: object) -> Result:
        return function(*args, rate_bytes_per_s=None if rate is None else rate_of(rate), **others)

    return command


@contextmanager
def opened_plain(
    urls: Sequence[str],
    options: Sequence[StorageOptions | None],
    *,
    encryption_key: str | None,
    write_quorum: int | None = None,
) -> Iterator[Backend]:
    """The stores as one backend, closed afterwards; nothing of ckpt needs to be in them. ``options``: each store's.

    Raises UsageError where a store is encrypted and no key is given, or the other way round: it would look all damaged.
    """
    where = key_source(encryption_key)
    keys = load_keys(where) if where is not None else None
    bare = open_stores(list(urls), list(options), write_quorum=write_quorum, tell=tell_alarms)
    try:
        for store in stores_of(bare):
            try:
                refuse_mismatch(store, keys)
            except (UnavailableError, NotFoundError, IntegrityError):
                continue  # the command itself tells what is the matter with the store
        yield encrypted(bare, keys) if keys is not None else bare
    finally:
        bare.close()


def tell_alarms(event: Event) -> None:
    """A Tell that warns on stderr."""
    if event.alarm:
        warn(event.text)
