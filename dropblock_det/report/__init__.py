"""Records to an answer: statistics, words, tables, the picture and the page.

Its columns come from the records' metrics; it knows neither Lightning nor a task.
"""
