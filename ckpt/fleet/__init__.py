"""How the keepers of one job's nodes speak: authenticated lines between them, and what is said there. No torch."""
