"""Patients: which scans are of one person, under which keyed hash, on which side of a split."""
