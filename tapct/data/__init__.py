"""From scan files to batches.

    discover -> readers -> geometry, ct_check, headers, patients -> ingest     one scan in memory
    index    -> manifest                                                       all scans, checked
    pack     -> packed, store                                                  all scans, compressed
    sampler  -> slabs, loader                                                  batches for training

`labels` finds the label map of each scan, `verify` reads a whole store again, `read_rate` measures
how fast a store is read, and `phantom` makes a synthetic archive. `ct_check` uses
`hu_histogram` and `slice_check`, with the thresholds of `check_rules`.
"""
