"""From a sealed slot to a committed snapshot: chunks, packs, parts, receipts."""
