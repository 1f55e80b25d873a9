"""Label layouts, one file each: a function `build(archive)` that returns an `archive.Layout`, and a
function `sign(source, root)` that returns whether a file may be labels by this layout.
"""
