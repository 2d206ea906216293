"""What a model is trained for: from a batch to a loss, and the metrics that say how good it is.

Each task declares its metrics in its ``metrics.py``; nothing outside a task knows their names.
"""
