"""The commands that train and evaluate: settings, Lightning's Trainer, signals, the table at the end.

Computes no loss and no metric: those are the tasks'.
"""
