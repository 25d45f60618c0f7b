"""From a snapshot to live objects, arrays or files."""
