"""Label layouts: where the label map of a scan lies, one file per layout.

To add another layout: write `labels/NAME.py` with a function `build(archive)` that returns a
function from a scan to its label file (`archive.FindLabels`), and add it to `pairing.LAYOUTS`. What
a layout knows of the archive is `archive.LabelArchive`. A layout decides by names alone; whether
the labels lie on the scan's grid is checked later, when both files are read.
"""
