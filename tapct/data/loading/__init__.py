"""Batches for training: which slabs of which scans, read ahead by threads."""
