"""Several stores as one: writes to all with a quorum, reads from the nearest, repair in the
background.
"""
