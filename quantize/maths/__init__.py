"""The mathematics of one layer: smoothing, low-rank branch, rounding to a grid."""
