"""A study to be run: its plan, the work on it by any number of processes, what is shown of it meanwhile."""
