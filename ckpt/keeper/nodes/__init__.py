"""This keeper among those of the job's other nodes."""
