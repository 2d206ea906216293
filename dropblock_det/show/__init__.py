"""What one looks at before a training: where regularizers would go, and what they remove.

Knows no task, and no other room knows it.
"""
