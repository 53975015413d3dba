"""The catalogue of findings: every code with its severity, a short title and what to do about it.

Gives `CATALOGUE` and `severity(code)`. Guarantees: numbers are stable once released and grouped by hundreds:
K0 text and syntax, K1 names, K2 sets and scopes, K3 time, K4 meaning, K5 cost, K6 heads and tables,
K7 binding to a model, K8 learn blocks, K9 parsed but not lowered by this version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding."""

    severity: Severity
    title: str
    explanation: str


CATALOGUE: dict[str, Code] = {
    # ------------------------------------------------------------ K0: text and syntax
    "K001": Code("error", "unexpected word", "The text does not follow the grammar at this place."),
    "K002": Code(
        "error", "unexpected character", "A character that the language does not use outside comments and strings."
    ),
    "K003": Code(
        "error", "unbalanced bracket or quote", "Every bracket and quote needs its partner, of the same kind."
    ),
    "K004": Code(
        "error", "indentation", "Blocks are indented by spaces, and every clause of a block by the same number."
    ),
    "K005": Code(
        "error", "else at clause depth", "`else` belongs to the `keep` above it; indent it deeper than that `keep`."
    ),
    "K006": Code("error", "block", "A header with clauses ends in `:`, and its clauses stand indented below it."),
    "K007": Code("error", "number", "A number is malformed or too large to be meant."),
    "K008": Code(
        "error", "nesting too deep", "Brackets, blocks or operators are nested beyond the limit of the language."
    ),
    "K009": Code("error", "text too large", "A policy text may hold at most 1 MiB."),
    "K010": Code("error", "unreadable file", "The policy file cannot be read as UTF-8 text."),
    "K011": Code("error", "no such file", "The policy path names no file."),
    "K012": Code(
        "error", "which policy", "A text with several policies needs a name to pick one; a text without any cannot run."
    ),
    "K013": Code("error", "unknown policy", "No policy of that name is in the file or the library."),
    "K014": Code("error", "argument order", "Positional arguments come before named ones, and each name stands once."),
    "K015": Code(
        "error", "not a policy", "A policy is a text with a line break, a path, or the name of a library policy."
    ),
    # ------------------------------------------------------------ K1: names
    "K101": Code(
        "error", "unknown name", "The word names no parameter, score, state, share, landmark, field or run-time number."
    ),
    "K102": Code("error", "unknown function", "The language has no function of that name here."),
    "K103": Code("error", "unknown region", "The set names no region and no `pick`."),
    "K104": Code("error", "unknown parameter", "The policy has no parameter of that name."),
    "K105": Code(
        "error", "reserved word", "Verbs, fields, axes, region and scope words cannot be given another meaning."
    ),
    "K106": Code("error", "defined twice", "A name stands for one thing within a policy or file."),
    "K107": Code("error", "unknown parent", "`extends` looks in the same file, then in the library."),
    "K108": Code(
        "error", "circular definition", "Policies, parameters, scores and head classes cannot be defined by themselves."
    ),
    "K109": Code("error", "wrong kind of value", "The value does not fit what the parameter or argument stands for."),
    "K110": Code(
        "error", "unknown unit", "A selection, region or scope names a unit that the policy does not declare."
    ),
    "K111": Code("error", "unknown scope", "Scopes are per, shared and across, each with its own words."),
    "K112": Code("error", "unknown trigger", "`at` knows prefill.end, chunk, step, every, filled, full and when."),
    "K113": Code("error", "wrong number of arguments", "The construct takes another number of arguments."),
    "K114": Code(
        "error", "unknown reduction or axis", "Reductions are sum mean max min var std softmax over q g h d i u."
    ),
    "K115": Code("error", "unknown format", "The word is no format of `store`."),
    "K116": Code("error", "unknown word", "The clause knows only the words that the message lists."),
    "K117": Code("warning", "unused parameter", "The parameter changes nothing: no clause reads it."),
    # ------------------------------------------------------------ K2: sets and scopes
    "K201": Code("error", "selection without a score", "`top`, `bottom` and `cover` rank entries: say by which score."),
    "K202": Code(
        "error",
        "left-over axis",
        "A score has one value per entry; every other axis must be reduced, only g may be left.",
    ),
    "K203": Code("error", "missing axis", "A reduction or score needs an axis that its operand does not have."),
    "K204": Code("error", "free query axis", "`keep` and `store` decide without a query: q must be reduced."),
    "K205": Code(
        "error", "impossible count", "By constants alone the count is negative (regions take more) or no whole number."
    ),
    "K206": Code("error", "attend wider than keep", "A query can only read what is still resident."),
    "K207": Code(
        "warning", "per query head", "Grouped query heads share one memory: the kept set is the union of their choices."
    ),
    "K208": Code("error", "scopes do not combine", "The selection names scopes that contradict each other."),
    "K209": Code("error", "pooling width", "Pooling is centred, so its width is an odd number of entries."),
    "K210": Code("error", "fraction", "A percentage lies between 0% and 100%, and `of` wants one on its left."),
    "K211": Code("error", "count", "A count is one number per row: a constant, a run-time number or a share."),
    "K212": Code(
        "warning",
        "nothing left to select",
        "A region of the union takes every entry, or the count is 0 for every prompt.",
    ),
    "K213": Code("error", "not a value", "The construct needs a number or an expression here."),
    "K214": Code(
        "error",
        "trained score out of place",
        "`learned` scores an entry as it comes in: in the first value of a state, or `on insert`.",
    ),
    # ------------------------------------------------------------ K3: time
    "K301": Code(
        "error",
        "last queries of a piece",
        "Under `at chunk` the last queries are those of the piece, not of the prompt.",
    ),
    "K302": Code(
        "note",
        "survivors are judged again",
        "A selection under `at chunk` without `frozen` re-judges earlier survivors.",
    ),
    "K303": Code("note", "grows in decode", "No trigger fires at steps, so generated entries are never evicted."),
    "K304": Code("warning", "set without a trigger", "A set is computed at its trigger; without one it never is."),
    "K305": Code("error", "trigger arguments", "The trigger takes another number or kind of arguments."),
    "K306": Code("warning", "trigger without a set", "No set clause stands above this `at`."),
    "K307": Code(
        "warning",
        "peek without pieces",
        "`peek` looks past the end of a piece, so it means something under `at chunk` only.",
    ),
    # ------------------------------------------------------------ K4: meaning
    "K401": Code(
        "warning", "merging rotated keys", "Keys carry their position as a rotation; their mean belongs to no position."
    ),
    "K402": Code("warning", "unreachable clause", "Another clause always comes first."),
    # ------------------------------------------------------------ K5: cost
    "K501": Code("note", "cost of a score", "What computing this score adds to the model's own work."),
    # ------------------------------------------------------------ K6: heads and tables
    "K601": Code("error", "undeclared head class", "A prefix names a head class that no `heads` line declares."),
    "K602": Code("error", "head classes overlap", "Every KV head belongs to one class."),
    "K603": Code("error", "heads left out", "Prefixed clauses must say something for every head, or `rest` must."),
    "K604": Code("error", "head source", "Head classes come from table(...), probe(...), another class or rest."),
    "K610": Code("error", "table unreadable", "The table is no readable text or safetensors file of a sensible size."),
    "K611": Code("error", "head table value", "A head table holds finite numbers only."),
    "K612": Code("error", "head table shape", "A head table has one number for each KV head of each layer."),
    "K613": Code(
        "error", "head table needs a threshold", 'Say which part of the heads the class takes: table("f.tsv", top=30%).'
    ),
    "K614": Code(
        "warning", "threshold and mask", "A table of only 0 and 1 is taken as it is; scores beside a mask are ranked."
    ),
    "K615": Code("error", "trained scores unreadable", "`learned` reads a safetensors file of at most 1 GiB."),
    "K616": Code("error", "trained scores do not fit", "The file must hold finite weights of this model's shape."),
    "K617": Code("warning", "probe not run", "Which heads a probe finds is known once it has run on the model."),
    "K618": Code("error", "share table", "A share's table has one number per layer, none of them negative."),
    # ------------------------------------------------------------ K7: binding to a model
    "K701": Code("error", "no such layer", "The policy names a layer that the model does not have."),
    "K702": Code("error", "head classes do not fit the model", "After binding, every KV head needs exactly one class."),
    "K703": Code("error", "impossible budget", "With this model or prompt the count cannot be met."),
    "K704": Code("error", "not a whole number", "The number must be a positive whole number once bound."),
    "K705": Code("error", "what cannot be combined", "Two clauses ask for things that exclude each other on one head."),
    "K706": Code("error", "model not supported", "The model lacks something that the policy needs."),
    "K707": Code(
        "error", "pick not filled", "A layer can keep or read only what an earlier layer, or the same, has picked."
    ),
    "K708": Code("warning", "unit never full", "No unit of this size is full in a text of this length."),
    # ------------------------------------------------------------ K8: learn blocks
    "K801": Code("error", "learn block incomplete", "A learn block has a gate, a mix and a loss."),
    "K802": Code("error", "learn clause twice", "A learn block has one gate, one mix, one loss and one freeze."),
    "K803": Code(
        "error",
        "unknown gate",
        "Gates of heads are hard_concrete, clamp01, sparsemax; of units block_gate, query_gate.",
    ),
    "K804": Code("error", "gate option", "The gate knows no such option, or it is not a number of the range it needs."),
    "K805": Code(
        "error", "gate scope", "There is one gate per KV head, of every layer; of units also one per query head."
    ),
    "K806": Code("error", "mix", "A mix is z * LEARNED + (1 - z) * OTHER, of two head classes with a `keep` each."),
    "K807": Code(
        "error", "loss", "A loss is a sum of next_token, hidden_mse, lagrange and mean(z), each once, with a factor."
    ),
    "K808": Code("error", "learning target", "A target lies between 0% and 100%, and a ramp is a part of the steps."),
    "K809": Code("warning", "gates stay open", "Without pressure on mean(z) every gate keeps its head."),
    "K810": Code("error", "pressure on exact gates", "The count of `sparsemax` is exact, so nothing can press on it."),
    "K811": Code("error", "nothing to freeze", "Only the weights of the model can be frozen."),
    "K812": Code("error", "weights are learned too", "This version learns gates of a model whose weights are frozen."),
    "K813": Code("error", "learned twice", "A head class or a trained score of a policy has one learn block."),
    "K814": Code("error", "set cannot be learned", "What a query reads must follow from positions."),
    "K815": Code("error", "which learn block", "Learning needs a learn block of the policy, and to know which one."),
    "K816": Code("warning", "nothing reads the mask", "What is learned is a table, which the class should come from."),
    "K817": Code(
        "error",
        "score cannot be learned",
        "A trained gate reads q and min, max or mean of k or raw.k of one fixed unit.",
    ),
    # ------------------------------------------------------------ K9: parsed, not lowered by this version
    "K901": Code("error", "clause not lowered yet", "This version reads the clause but cannot run it."),
    "K902": Code("error", "region not lowered yet", "This version reads the region but cannot run it."),
    "K903": Code("error", "trigger not lowered yet", "This version reads the trigger but cannot run it."),
    "K904": Code("error", "scope not lowered yet", "This version reads the scope but cannot run it."),
    "K905": Code("error", "score form not lowered yet", "This version reads the expression but cannot run it."),
    "K906": Code("error", "state update not lowered yet", "This version reads the update but cannot run it."),
    "K908": Code("error", "loser action not lowered yet", "This version reads the action but cannot run it."),
    "K909": Code("error", "format not lowered yet", "This version reads the format but cannot run it."),
    "K911": Code("error", "positions not lowered yet", "Positions are one thing for the whole policy."),
    "K912": Code("error", "switched-off heads not lowered yet", "Attention is switched off by whole layers."),
    "K913": Code("error", "unit form not lowered yet", "This version runs units of a fixed size only."),
    "K914": Code("error", "share form not lowered yet", "This version reads the share but cannot run it."),
}


def severity(code: str) -> Severity:
    """The severity of a code."""
    return CATALOGUE[code].severity
