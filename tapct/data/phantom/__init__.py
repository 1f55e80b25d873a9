"""The phantom: a synthetic archive of torso CT scans with organ labels.

`archive` makes and writes all cases, `patient` draws patients and studies, `torso` and `organs`
paint a patient on a `canvas`, `warp` moves the body of a follow-up by a known map, `scan` measures
the painted body as a scanner does, `truth` holds what is true of a scan and where its landmarks are
(with `frame`, which maps positions), and `files` and `truth_files` write a case as NIfTI or DICOM
and the truth as tables.
"""
