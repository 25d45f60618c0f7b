"""``ckpt run``: torchrun with the options of ckpt's rendezvous filled in."""

from __future__ import annotations

import importlib

import click

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
    help="Send no more than this in a second for that, such as 500MiB.",
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
    # Imported here: no other command needs torch.
    status: int = importlib.import_module("ckpt.elastic.rendezvous.run").run([*given, *arguments])
    return status
