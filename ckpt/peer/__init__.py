"""Memory of another node as a store: a vault, the server that lends it, and the client that is a Backend."""
