"""Measuring the operator and a training step beside other implementations, and showing the rows.

No other room knows it: what is measured is the package as its users have it.
"""
