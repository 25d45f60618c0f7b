"""Many stores as one: whom to write to, whom to ask, and what to mend."""
