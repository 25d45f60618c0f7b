"""``ckpt run``: torchrun with the options of ckpt's rendezvous filled in."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence

import click

from ckpt.cluster.secret import missing_secret

_EPILOG = """\b
Examples:
  ckpt run --nproc-per-node=8 train.py
  ckpt run --rdzv-endpoint=h1:2379,h2:2379,h3:2379 --rdzv-id=JOB --nnodes=2 --nproc-per-node=8 \\
           --secret=job.secret --tls-cert=node.pem --tls-key=node.key --tls-ca=ca.pem train.py \
--lr=0.1
  ckpt key new job.secret          make the secret, once; copy it to every node

\b
Options of ckpt and of torchrun may be mixed before the script; `ckpt run --nnodes=1 --help` \
lists torchrun's too. Start the
same command on each node, and on one more than --nnodes says for a standby. Without \
--rdzv-endpoint all are on this machine.
Further settings go into --rdzv-conf: ca_file, cert_file, key_file, user, password_file (of \
etcd), mirror_bytes, grow,
grow_timeout, last_call_timeout, shrink_timeout, join_timeout, close_timeout.
Nodes on different machines need --tls-cert, --tls-key and --tls-ca, or --plaintext.

\b
Exit codes: 0 all ended well · 1 the program failed on this node for good · 2 the options cannot \
work · 11 no round of nodes
came in time, or etcd does not answer · 12 the job was over already · 128 + n ended by signal n
"""


def etcd_without_secret(
    own: Mapping[str, str | None], arguments: Sequence[str], environment: Mapping[str, str]
) -> str:
    """Where nodes would meet in etcd without a secret; "" if they would not. A first look, without
    torch's parser: importing torch takes seconds.

    ``own``: our options by name. ``arguments``: torch's options, then the script; ours that come
    after one of torch's with a value of its own are among them. torch finds options in the
    ``environment`` too.
    """
    torch = dict(_options(arguments))
    endpoint = torch.get("rdzv_endpoint") or environment.get("PET_RDZV_ENDPOINT", "")
    conf = torch.get("rdzv_conf") or environment.get("PET_RDZV_CONF", "")
    keys = {part.partition("=")[0].strip(): part.partition("=")[2] for part in conf.split(",")}
    standby = own.get("standby") or torch.get("standby") or keys.get("standby") or "warm"
    if not endpoint or endpoint.startswith("/") or standby != "warm":
        return ""  # on one machine the secret is made; an undecorated program needs none
    secret = own.get("secret") or torch.get("secret") or keys.get("secret")
    return "" if secret else endpoint


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options with their values, up to the first word that belongs to none: the script."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            return
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in FLAGS:
            continue
        yield name, value if equals else next(words, "")


FLAGS = ("standalone", "module", "m", "no_python", "run_path", "virtual_local_rank", "help", "h")
"""torch's options without a value."""


@click.command(
    name="run",
    epilog=_EPILOG,
    options_metavar="[OPTIONS] [TORCHRUN OPTIONS]",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "--secret",
    metavar="FILE",
    help="What only the job's nodes know; wanted where they meet in etcd.",
)
@click.option(
    "--host",
    metavar="ADDRESS",
    help="Where other nodes reach this one; by default found by the way to etcd.",
)
@click.option(
    "--domain",
    metavar="NAME",
    help="What this node fails together with, a rack say; by default its host.",
)
@click.option(
    "--mirrors", metavar="N", help="On how many other nodes staged state is kept; by default 1."
)
@click.option(
    "--mirror-rate",
    metavar="SIZE",
    help="Send no more than this in a second for that, such as 500MiB; by default 1GiB, 0: no "
    "limit.",
)
@click.option(
    "--ttl", metavar="SECONDS", help="After how long a silent node is lost; by default 5."
)
@click.option(
    "--standby",
    metavar="warm|wait",
    help="warm: extra nodes start the program at once and hold mirrored state (default; for "
    "decorated programs only). "
    "wait: they wait, for any program.",
)
@click.option(
    "--tls-cert",
    metavar="FILE",
    help="This node's certificate, which names its host: nodes then speak TLS.",
)
@click.option("--tls-key", metavar="FILE", help="Its key.")
@click.option(
    "--tls-ca",
    metavar="FILE",
    help="The one authority that signed the certificates of all the job's nodes.",
)
@click.option(
    "--plaintext",
    is_flag=True,
    help="Lend memory to other machines without TLS. Nobody can forge anything, but weights and "
    "optimizer state can then be "
    "read by whoever sees the packets on their path.",
)
@click.argument(
    "arguments", metavar="SCRIPT [ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED, required=True
)
def command(arguments: tuple[str, ...], *, plaintext: bool, **own: str | None) -> int:
    """Start SCRIPT on this node, as torchrun does, together with the job's other nodes."""
    given = [
        f"--{name.replace('_', '-')}={value}" for name, value in own.items() if value is not None
    ]
    given += ["--plaintext"] if plaintext else []
    if where := etcd_without_secret(own, arguments, os.environ):
        raise missing_secret(where)
    # Imported here: no other command needs torch.
    status: int = importlib.import_module("ckpt.elastic.rendezvous.run").run([*given, *arguments])
    return status
