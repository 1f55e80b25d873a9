"""The index of an archive: every scan examined, accepted or refused, and reported."""
