"""The store: scans and label maps, packed one by one, and the commands that write and verify it."""
