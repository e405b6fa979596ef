"""How far a 4-bit model is from its source."""
