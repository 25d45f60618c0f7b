"""Looking after stores: retention, sweeping, scrubbing, syncing, examining."""
