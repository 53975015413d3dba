"""`python -m kvcompile` and the `kvcompile` script: the command line, its warnings as one line each on stderr."""

from __future__ import annotations

import warnings

from kvcompile import cli


def main() -> int:
    """Run the command that the process was started with."""
    usual = warnings.formatwarning

    def plainly(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
        if issubclass(category, UserWarning):
            return f"warning: {message}\n"
        return usual(message, category, *place, **more)  # type: ignore[arg-type]

    warnings.formatwarning = plainly
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
