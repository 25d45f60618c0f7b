"""The attempts of a launch: who runs, what failed, what hangs, what follows."""
