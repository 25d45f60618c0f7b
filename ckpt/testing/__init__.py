"""For tests of stores and of programs: the backend contract, stores that misbehave, crash points, a
sample store."""
