"""How the processes of one node speak: messages, frames, shared counters, the runtime folder."""
