"""Measuring the operator and a training step beside other implementations, and showing the rows."""
