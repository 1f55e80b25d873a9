"""Functions that run in worker processes or threads, and may crash or never return."""
