"""Elastic training: the decorator, its run, supervised processes, and torchrun's rendezvous."""
