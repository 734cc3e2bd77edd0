"""Fitting: mean, basis, widths and scales of keys."""
