"""The nodes of a job: who is in it, how they speak, and memory that they keep for each other."""
