"""The DropBlock operator: the reference (the oracle), the CPU and CUDA paths, and what chooses.

Knows tensors only: no module, no model, no training.
"""
