"""Runs beside each other: one run to its rows (`run`), encodings x seeds (`compare/`), controlled tasks (`probes/`)."""
