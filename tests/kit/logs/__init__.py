"""Logs over several stores: simulations, an oracle, claimers in other processes."""
