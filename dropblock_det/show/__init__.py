"""What one looks at before a training: where regularizers would go, and what they remove."""
