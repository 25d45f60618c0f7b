"""A kit for users and our own tests: backend contract, faulty stores, crash points."""
