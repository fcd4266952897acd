"""Curvature of the training loss in the selected weights."""
