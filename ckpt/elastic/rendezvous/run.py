"""torchrun with ckpt's rendezvous filled in, for ``ckpt run``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import elastic_launch

from ckpt.elastic.rendezvous import create
from ckpt.elastic.rendezvous.options import BACKEND
from ckpt.elastic.verdict import VERDICT_VARIABLE, VerdictFile
from ckpt.errors import ConflictError, UnavailableError, UsageError

CKPT_OPTIONS = (
    "secret",
    "host",
    "domain",
    "mirrors",
    "mirror_rate",
    "ttl",
    "standby",
    "tls_cert",
    "tls_key",
    "tls_ca",
)
"""The settings of ``--rdzv-conf`` that are options of ``ckpt run``,"""

CKPT_FLAGS = ("plaintext",)
"""and those without a value."""

MAX_RESTARTS = 3
"""How often an agent starts the program again unless told otherwise: if a supervisor died, or the
job could not go on without a node that was asked to go. torchrun's own default is 0."""
MAX_RESTARTS_VARIABLE = "PET_MAX_RESTARTS"
"""The environment variable that torchrun takes the option from."""

EXIT_FAILED = 1
"""A worker of this node failed for good; torchrun's own status for it."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line, without the program's name; returns its exit status.

    Raises UsageError, UnavailableError if no round began or the membership is unreachable,
    ConflictError if the job is over.
    """
    try:
        args = _parser().parse_args(list(arguments))
    except SystemExit as end:  # it printed the help or an error
        return int(end.code or 0)
    args = fill_in_options(args)
    with suppress(ValueError):  # installed, it was registered by torch
        rendezvous_handler_registry.register(BACKEND, create)
    try:
        record(_launch)(args)
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        return _failed_status()
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousTimeoutError, RendezvousConnectionError) as error:
        raise UnavailableError(str(error)) from error
    except RendezvousClosedError as error:
        if _failed_status() == UsageError.exit_code:
            raise UsageError(str(error)) from error
        raise ConflictError(str(error)) from error
    return 0


def _failed_status() -> int:
    """What a program that failed for good exits with: as its verdict says, if it gave one."""
    verdict = VerdictFile(Path(os.environ.get(VERDICT_VARIABLE, os.devnull))).read()
    return EXIT_FAILED if verdict is None else verdict.status


def _parser() -> ArgumentParser:
    parser: ArgumentParser = torchrun.get_args_parser()
    parser.prog = "ckpt run"
    parser.description = (
        "torchrun, over ckpt's membership: every option of torchrun, and ckpt's own at the end."
    )
    parser.set_defaults(rdzv_backend=BACKEND)
    if MAX_RESTARTS_VARIABLE not in os.environ:
        parser.set_defaults(max_restarts=MAX_RESTARTS)
    group = parser.add_argument_group("ckpt")
    for name in CKPT_OPTIONS:
        group.add_argument(_option(name), help=f"as {name}= in --rdzv-conf; see ckpt run --help")
    for name in CKPT_FLAGS:
        group.add_argument(
            _option(name), action="store_const", const="1", help=f"as {name}=1 in --rdzv-conf"
        )
    return parser


def fill_in_options(args: Namespace) -> Namespace:
    """The options as torchrun takes them."""
    if args.rdzv_backend != BACKEND:
        raise UsageError(
            f"ckpt run has its own rendezvous. rdzv_backend={args.rdzv_backend}; torchrun takes "
            "others"
        )
    own = {
        name: getattr(args, name)
        for name in (*CKPT_OPTIONS, *CKPT_FLAGS)
        if getattr(args, name) is not None
    }
    own.setdefault("standby", "warm")
    if invalid := [name for name, value in own.items() if "," in value or not value]:
        raise UsageError(f"an option is empty, or holds a comma. option={_option(invalid[0])}")
    given = {part.partition("=")[0].strip() for part in args.rdzv_conf.split(",")}
    if args.standby is None and "standby" in given:
        own.pop("standby")
    args.rdzv_conf = ",".join(
        [*filter(None, [args.rdzv_conf]), *(f"{name}={value}" for name, value in own.items())]
    )
    args.standalone = False  # without an endpoint it is one machine and no service anyway
    for unused in ("master_addr", "node_rank"):  # torch warns that they mean nothing here
        delattr(args, unused)
    return args


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _launch(args: Namespace) -> None:
    try:
        config, command, rest = torchrun.config_from_args(args)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"torchrun can't work with these options: {error}") from error
    elastic_launch(config=config, entrypoint=command)(*rest)
