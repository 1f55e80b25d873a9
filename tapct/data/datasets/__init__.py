"""Public data sets: their descriptions, and their way to a store."""
