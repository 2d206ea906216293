"""The commands that train and evaluate: settings, Lightning's Trainer, signals, the table at the end."""
