"""From sealed slots to committed snapshots, beside training: one queue a rank, and how the ranks' queues speak. No torch."""
