"""Several stores as one: quorum writes, reads from the nearest, repair in the background."""
