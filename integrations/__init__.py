"""Integrations with other projects; they see only the public face of ckpt."""
