"""Training a byte-level decoder with a compressive memory from scratch, on one core."""
