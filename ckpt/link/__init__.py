"""How the processes of one node speak: a unix socket to the keeper, and shared memory beside it. No torch."""
