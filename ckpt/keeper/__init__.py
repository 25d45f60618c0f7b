"""The daemon that outlives trainers: holds slots and board, restarts attempts, makes snapshots durable. No torch."""
