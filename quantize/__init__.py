"""LAYER 2: what a 4-bit model is, how it is stored, how it is made. torch and safetensors, never the host."""
