"""Comparison of encodings x seeds: plans the runs, executes them and compares their results.

Runs become groups (`groups` of run folders, `outcome` of raw rows), groups over seeds become summaries with paired
differences (`summary`, `paired`), and these the columns of tables, pages and files (`report`, `outcome`).
"""
