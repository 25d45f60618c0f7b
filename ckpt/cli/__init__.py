"""The command line, ``ckpt``."""
