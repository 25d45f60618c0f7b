"""Random faults at stores under a writer, and what must hold afterwards."""
