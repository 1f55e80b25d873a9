"""Label layouts, one file each: a function `build(archive)` that returns an `archive.Layout`."""
