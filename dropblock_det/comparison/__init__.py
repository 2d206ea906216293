"""Training every setting with every seed: the plan, the processes, what is finished.

Knows run folders and records; neither Lightning nor a task.
"""
