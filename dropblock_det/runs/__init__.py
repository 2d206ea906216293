"""One training run's folder: its paths, its checkpoints, and its record, an entry per epoch.

The record carries the metrics that its task declared; this room knows none by name.
"""
