"""Checks of the voxels of one scan: whether they are CT in HU, and undamaged."""
