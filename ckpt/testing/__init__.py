"""The shipped test kit: a backend contract, faulty stores, crash points, and a sample store."""
