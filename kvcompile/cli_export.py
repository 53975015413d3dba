"""The command that hands a policy's layer to other compilers: export.

Takes a policy and a local model folder; gives MLIR text on stdout or in a file. Guarantees: `--to linalg` and
`--to stablehlo` read no weights; the same arguments give the same bytes; nothing is written where the export failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompile import cli_options as shared


def export(
    policy: shared.Policy,
    model: shared.ModelFolder,
    to: Annotated[
        str, typer.Option("--to", metavar="DIALECT", help="torch (kvc operators kept), linalg or stablehlo.")
    ] = "torch",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A file; default: stdout.")] = None,
    layer: Annotated[int, typer.Option("--layer", metavar="N", min=0, help="Which decoder layer.")] = 0,
    phase: Annotated[str, typer.Option("--phase", metavar="PHASE", help="step or prefill.")] = "step",
    length: Annotated[
        int, typer.Option("--length", metavar="N", min=1, help="Tokens of the prompt; columns of a row.")
    ] = 64,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    as_json: shared.AsJson = False,
) -> None:
    """Write one layer under a policy as MLIR text, with torch-mlir."""
    shared.choice(to, ("torch", "linalg", "stablehlo"), "--to")
    shared.choice(phase, ("step", "prefill"), "--phase")
    params, paths = shared.parameters(settings), shared.table_files(tables)
    for word in sorted(params.keys() & {"to", "layer", "phase", "length"}):
        raise typer.BadParameter(f"{word!r} is an option of export, not a parameter of a policy", param_hint="--set")
    shared.check_first(policy, {"name": name, **params})
    from kvcompile.exporting import export as exported
    from kvcompile.exporting import require_torch_mlir

    require_torch_mlir()
    if out is not None:
        if out.is_dir():
            raise typer.BadParameter(f"{out} is a folder; name a file in it", param_hint="--out")
        if not out.exists():
            shared.check_folder(out.parent, f"--out {out}")
    with shared.progress("exporting"):
        source = shared.load_model(model, anywhere=False) if to == "torch" else shared.load_config(model)
        found = exported(
            source, policy, to=to, layer=layer, phase=phase, length=length, name=name, tables=paths, **params
        )
    if out is not None:
        out.write_text(found.text, encoding="utf-8")
    if as_json:
        facts: dict[str, Any] = found.to_dict()
        shared.print_json(facts if out is None else {**facts, "text": None, "path": str(out)})
    elif out is None:
        typer.echo(found.text, nl=False)
