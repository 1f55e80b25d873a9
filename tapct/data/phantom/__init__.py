"""The phantom: a synthetic archive of torso CT scans with organ labels.

`archive` makes and writes all cases, `patient` draws patients and studies, `torso` and `organs`
paint a patient on a `canvas`, `scan` measures the painted body as a scanner does, and `files`
writes a case as NIfTI or DICOM.
"""
