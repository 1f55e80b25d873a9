"""Label maps: which file holds the labels of a scan, and how it is read onto the scan's grid.

- `layouts/`: where the labels of a scan lie, one file per layout; `pairing` tries them in order
- `reading`: a file, a folder of masks or a DICOM object becomes a `LabelMap` on the scan's grid
- `values`, `grid`, `names`, `overlay`: the rules for label values, grids, names and overlaps
- `report`: the counts that `tapct index` prints

To add another layout: write `labels/layouts/NAME.py` with a function `build(archive)` that returns
an `archive.Layout`, and a function `sign(source, root)`, and add it to the modules in `pairing`.
What a layout knows of the archive is `archive.LabelArchive`. A layout decides by names (or by the
references of DICOM objects) alone; whether the labels lie on the scan's grid is checked later, when
both files are read. `sign` returns True if a file may be a label file by this layout. If it returns
False for all layouts and files, the archive is not held in memory to find pairs.
"""
