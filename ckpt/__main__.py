"""``python -m ckpt`` is the ``ckpt`` command."""

from ckpt.cli.main import main

main()
