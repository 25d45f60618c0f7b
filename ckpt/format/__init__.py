"""What is stored: records, manifests, parts, chunks, object leaves, and the keys of each."""
