"""`python -m tapct` and `torchrun -m tapct`."""

from __future__ import annotations

from tapct.cli import main

if __name__ == "__main__":
    main()
