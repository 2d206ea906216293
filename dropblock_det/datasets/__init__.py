"""Image files and annotations to batches: checked, augmented, shared out over processes.

Knows no model and no loss.
"""
