"""Memory of another node as a store."""
