"""The daemon of a node: owns staged memory, starts attempts, makes snapshots durable."""
