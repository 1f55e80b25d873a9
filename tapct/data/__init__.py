"""From scan files to batches.

    search  -> readers -> scans, with checks and patients      one scan in memory
    index   -> manifest                                        all scans, checked
    packed                                                     all scans, compressed
    loading                                                    batches for training

`labels` finds and reads the label map of each scan, `datasets` prepares public data sets, `workers`
runs what may crash or never return, and `phantom` makes a synthetic archive. A folder imports only
from those that are listed below it in the tree of README.
"""
