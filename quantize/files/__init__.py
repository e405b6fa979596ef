"""Model files: sources in 16 bit, 4-bit checkpoints in every dialect, downloads."""
