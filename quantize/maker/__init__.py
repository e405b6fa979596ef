"""A 16-bit model becomes a 4-bit file: plan, decide, make, write."""
