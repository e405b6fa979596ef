"""A user's LoRAs as columns of the low-rank branch."""
