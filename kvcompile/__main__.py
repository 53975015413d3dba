"""`python -m kvcompile` and the `kvcompile` script: the command line."""

from __future__ import annotations

from kvcompile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
