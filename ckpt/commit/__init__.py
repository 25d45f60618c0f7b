"""The commit log: its pure fold, and the effects that read and extend it."""
