"""Events and metrics: what happened, told once, in one form."""
