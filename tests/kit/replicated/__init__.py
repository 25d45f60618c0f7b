"""Replicated stores: doubles that can be held up, a clock, a simulation, quorums."""
