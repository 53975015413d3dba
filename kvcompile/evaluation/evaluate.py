"""`evaluate`: policies on suites at common budgets, beside full attention.

Takes a model and policies (names, texts, paths or `Case` objects); gives an `Evaluation`. Guarantees: full attention
runs through the same path, as the policy `keep_all`; a mistake in a policy is found before anything runs; a parameter
or table goes to every policy that has it, and one that no policy has is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcompile.dsl import ast, load, resolve
from kvcompile.dsl.resolve import Resolved
from kvcompile.evaluation import fingerprint
from kvcompile.evaluation.budgets import Case, is_fixed, part
from kvcompile.evaluation.results import Evaluation
from kvcompile.evaluation.samples import suite as suite_of
from kvcompile.evaluation.sweep import sweep
from kvcompile.kernels.errors import KvCompileError

FULL = "keep_all"


def evaluate(
    model: Any,
    policies: Any,
    suite: Any,
    *,
    tokenizer: Any = None,
    length: int | Sequence[int] = 4096,
    count: int = 32,
    seeds: Sequence[int] = (0,),
    budgets: Sequence[object] | None = None,
    chunks: Sequence[int] | None = None,
    out: str | Path | None = None,
    batch: int = 16,
    threshold: float = 0.9,
    progress: bool = False,
    backend: str = "auto",
    compile: str = "auto",
    jobs: int = 1,
    name: str | None = None,
    params: Mapping[str, Any] | None = None,
    tables: Mapping[str, str | Path] | None = None,
) -> Evaluation:
    """Ask a model under several policies what suites ask, and measure what its cache costs meanwhile.

    policies: one or several; a name, text or path stands for a case at each of `budgets` ("10%" or 0.1: the part of
    the prompt to keep) and `chunks` (tokens per piece of the prompt), a `Case` for itself. suite: one or several, by
    name, as a folder or as an object. length: tokens of a prompt, one number or several. count: samples per cell.
    out: folder that keeps finished cells. threshold: of full attention's score, for the critical footprint.
    params, tables, name: as in `optimize`, for the policies that have them. The rest as in `sweep`.

    Raises PolicyError for a policy, KvCompileError for the rest.
    """
    suites = [suite_of(one) if isinstance(one, str) else one for one in _several(suite, (str,))]
    lengths = [length] if isinstance(length, int) else list(length)
    _check_numbers(model, lengths, count, seeds, threshold)
    cases = cases_of(policies, budgets, chunks, name=name, params=params, tables=tables)
    full = next((case.label for case in cases if case.policy == FULL and case.budget is None), None)
    if full is None:
        full = "full"
        cases = [Case(full, FULL), *cases]
    tokenizer = tokenizer if tokenizer is not None else _own_tokenizer(model)
    cells = sweep(
        model, tokenizer, cases, suites, lengths=lengths, count=count, seeds=list(seeds), batch=batch, out=out,
        jobs=jobs, progress=progress, backend=backend, compile=compile,
    )  # fmt: skip
    config = {
        "suites": [{"name": one.name, "version": one.version} for one in suites],
        "lengths": lengths,
        "count": count,
        "seeds": list(seeds),
        "batch": batch,
        "backend": backend,
        "compile": compile,
        "model": _described(model),
        "versions": fingerprint.versions(),
        "machine": fingerprint.machine(model),
    }
    return Evaluation(cells, full, threshold, config)


def cases_of(
    policies: Any,
    budgets: Sequence[object] | None = None,
    chunks: Sequence[int] | None = None,
    *,
    name: str | None = None,
    params: Mapping[str, Any] | None = None,
    tables: Mapping[str, str | Path] | None = None,
) -> list[Case]:
    """The cases that policies stand for. A policy without anything to set, as `keep_all`, is one case."""
    keeps: list[float | None] = [None] if budgets is None else [float(part(budget)) for budget in budgets]
    pieces: list[int | None] = [None] if chunks is None else list(chunks)
    params, tables = dict(params or {}), dict(tables or {})
    taken: set[str] = set()
    labels: set[str] = set()
    out: list[Case] = []
    for policy in _several(policies, (str, os.PathLike, Case)):
        if isinstance(policy, Case):
            out.append(policy)
            continue
        loaded = load(policy, name)
        plain = resolve(loaded)
        if plain.name in labels:
            raise KvCompileError(f"two policies are called `{plain.name}`: give one of them another name")
        labels.add(plain.name)
        mine = {key: value for key, value in params.items() if key in dict(plain.params)}
        files = {key: path for key, path in tables.items() if key in _filed(plain)}
        taken |= set(mine) | set(files)
        resolve(loaded, mine)  # finds wrong values before a sweep would take them for ones that only do not fit
        pairs = [(keep, chunk) for keep in keeps for chunk in pieces]
        if is_fixed(loaded):
            pairs = [(None, None)]
        out += [Case(plain.name, policy, mine, files, keep, chunk, name) for keep, chunk in pairs]
    _check_cases(out, [*params, *tables], taken)
    return out


def _filed(resolved: Resolved) -> set[str]:
    """The names of a policy that may stand on a file: head classes, shares and trained states."""
    names = {head.decl.name for head in resolved.heads}
    for placed in resolved.of(ast.Share, ast.State, ast.On):
        match placed.clause:
            case ast.Share(name=share):
                names.add(share)
            case ast.State(assigns=assigns):
                names |= {assign.name for assign in assigns}
            case ast.On(updates=updates):
                names |= {update.name for update in updates}
    return names


def _check_cases(cases: list[Case], given: list[str], taken: set[str]) -> None:
    for key in given:
        if key not in taken and not any(key in case.params or key in case.tables for case in cases):
            raise KvCompileError(f"no policy here has a parameter or a table `{key}`: check its name, or leave it out")
    if not cases:
        raise KvCompileError("no policy is given: name at least one")


def _check_numbers(model: Any, lengths: list[int], count: int, seeds: Sequence[int], threshold: float) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not lengths or not seeds or count < 1 or min(lengths) < 1:
        raise KvCompileError("give at least one length, one seed and one sample, and lengths from 1")
    if most is not None and max(lengths) > most:
        raise KvCompileError(f"prompts of {max(lengths)} tokens are longer than the model's {most} positions")
    if not 0 < threshold <= 1:
        raise KvCompileError(f"a threshold of {threshold} is outside of (0, 1]: give the part of the score to keep")


def _own_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    folder = str(getattr(model, "name_or_path", "") or "")
    if not Path(folder).is_dir():
        raise KvCompileError("the model says no folder that could hold its tokenizer: give tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # every kind there is: JSON, unknown classes, missing files
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise KvCompileError(
            f"the model's folder has no tokenizer that can be loaded ({reason}): give tokenizer="
        ) from error


def _described(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {
        "name": Path(str(getattr(model, "name_or_path", "") or "")).name,
        "digest": fingerprint.model_digest(model),
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _several(one_or_more: Any, single: tuple[type, ...]) -> list[Any]:
    alone = isinstance(one_or_more, single) or not isinstance(one_or_more, Iterable)
    return [one_or_more] if alone else list(one_or_more)
