"""What is stored: keys, records, manifests, parts, the codecs of chunks and of plain values, one
spelling each."""
