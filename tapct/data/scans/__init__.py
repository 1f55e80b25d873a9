"""One scan from its files to HU in memory: orientation, spacing, facts of its header."""
