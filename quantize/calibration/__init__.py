"""Calibration statistics: what the quantizer knows of a layer's input."""
