"""Columns keyed by example id, filled by one pass over the training data."""
