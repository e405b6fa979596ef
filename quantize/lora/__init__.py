"""A user's LoRAs on 4-bit layers: columns beside those of the low-rank branch. Knows nothing of any host."""
