"""Command lines that documents and manifests show, read by the parsers that would read them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

from ckpt.elastic.rendezvous import run as rendezvous_run
from ckpt.elastic.rendezvous.options import RendezvousSettings, parse_settings


def launch_of(words: Sequence[str]) -> tuple[argparse.Namespace, RendezvousSettings | None]:
    """What ``ckpt run ...`` or ``torchrun ...`` asks for; the settings where it meets by ckpt's
    rendezvous.

    Raises UsageError, or SystemExit, where the options can't work.
    """
    if list(words[:2]) == ["ckpt", "run"]:
        args = rendezvous_run.fill_in_options(rendezvous_run._parser().parse_args(list(words[2:])))
    else:
        assert words[0] == "torchrun", f"neither ckpt run nor torchrun: {words}"
        args = torchrun.get_args_parser().parse_args(list(words[1:]))
    if args.rdzv_backend != rendezvous_run.BACKEND:
        return args, None
    least, most = torchrun.parse_min_max_nnodes(args.nnodes)
    settings = parse_settings(
        args.rdzv_id,
        args.rdzv_endpoint,
        agents_min=least,
        agents_max=most,
        config=_parse_rendezvous_config(args.rdzv_conf),
        local_addr=args.local_addr or "",
    )
    nodes = settings.nodes
    if nodes is not None and nodes.where.startswith(
        "etcd://"
    ):  # what a keeper would refuse before it asks anybody
        assert nodes.secret, f"no secret: {words}"
        assert nodes.plaintext or nodes.tls_cert, f"neither TLS nor plaintext: {words}"
    return args, settings
