"""The rows of RULER, LongBench and HELMET files: which layout a row has, and the sample that it stands for.

Takes a row, as JSON gave it, and the names of its file and folders; gives layout, task and `Sample`. Fields and
limits on new tokens are those of the published data and configurations, the wording of prompts is ours (RULER's files
hold whole prompts). Rows are not trusted: every field is checked, and `Refused` says which is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites.telling import depth_of

UNDERSTOOD = (
    "RULER: FOLDER/TASK/*.jsonl, rows with `input` and `outputs`, TASK one of niah_*, vt, cwe, fwe, qa_*",
    "LongBench: TASK.jsonl or TASK_e.jsonl, rows with `input`, `context` and `answers`",
    "HELMET recall: ruler/niah_*/*.jsonl, rows with `context`, `query` and `answer` or `outputs`; "
    "json_kv/*.jsonl or *.json, rows with `context`, `question`, `answer` and `demos`",
)
MOST_REFERENCES = 10_000


class Refused(ValueError):
    """A row that cannot be a sample; the message says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """name: of the benchmark. fields: those that tell its rows from others'. read(row, task) gives the sample."""

    name: str
    fields: frozenset[str]
    read: Callable[[dict[str, Any], str], Sample]


def layout_of(row: dict[str, Any]) -> Layout | None:
    """The layout whose fields a row has; the one with most of them, None where there is none."""
    fits = [layout for layout in LAYOUTS if layout.fields <= row.keys()]
    return max(fits, key=lambda layout: len(layout.fields), default=None)


def task_of(path: Path, layout: Layout, row: dict[str, Any]) -> str:
    """The task that a file is of. Raises Refused where its name, its folders and its row do not tell."""
    if layout.name == "LongBench":
        task = row.get("dataset")
        task = task if isinstance(task, str) else path.stem
        task = task.removesuffix("_e").lower()
        if task not in LONGBENCH:
            raise Refused(f"task {task!r} of LongBench is not supported (Chinese tasks need a word splitter)")
        return task
    if "demos" in layout.fields:
        return "json_kv"
    for name in (path.stem, path.parent.name, path.parent.parent.name):
        if re.fullmatch(r"(niah|vt|cwe|fwe|qa)(_\w+)?", name):
            return name
    raise Refused(f"neither file nor folder is named as a task of {layout.name}: niah_*, vt, cwe, fwe, qa_*")


def text(row: dict[str, Any], field: str) -> str:
    """A field that must be text that can be written as UTF-8."""
    value = row.get(field)
    if not isinstance(value, str):
        raise Refused(f"field {field!r} must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"field {field!r} holds half a character") from None
    return value


def texts(row: dict[str, Any], field: str) -> tuple[str, ...]:
    """A field that must be a list of texts or whole numbers, or one of them; at least one, none empty."""
    value = row.get(field)
    values = value if isinstance(value, list) else [value]
    plain = [str(item) if type(item) is int else item for item in values]
    if not 0 < len(plain) <= MOST_REFERENCES or not all(isinstance(item, str) and item for item in plain):
        raise Refused(f"field {field!r} must be a list of answers, none empty")
    return tuple(text({field: item}, field) for item in plain)


# RULER, constants of its tasks: new tokens by kind of task.
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def _ruler(row: dict[str, Any], task: str) -> Sample:
    # Later versions keep the beginning of the answer in a field of its own; without it the prompt would lack it.
    prompt = text(row, "input") + (text(row, "answer_prefix") if "answer_prefix" in row else "")
    outputs = texts(row, "outputs")
    kind = task.partition("_")[0]
    rule = "contained_any" if kind == "qa" else "contained"
    turn = Turn("", ", ".join(outputs), tokens=RULER_TOKENS[kind], accepted=outputs, rule=rule)
    return Sample(prompt, (turn,), _depth(prompt, outputs[0]) if kind == "niah" else None)


def _depth(prompt: str, needle: str) -> float | None:
    return depth_of(prompt, needle) if needle in prompt else None


def _helmet_niah(row: dict[str, Any], task: str) -> Sample:
    if not task.startswith("niah"):
        raise Refused(f"of HELMET's RULER files, only those of niah tasks are understood, not {task}")
    kind, query = text(row, "type_needle_v"), text(row, "query")
    answers = texts(row, "answer" if "answer" in row else "outputs")
    prompt = (
        f"Special magic {kind} are hidden in the following text. Remember all of them.\n\n{text(row, 'context')}\n\n"
        f"Question: which special magic {kind} does the text give for {query}?\n"
        f"Answer: the special magic {kind} that the text gives for {query}:"
    )
    tokens = 100 if kind.startswith("uuid") else 50
    turn = Turn("", ", ".join(answers), tokens=tokens, accepted=answers, rule="contained")
    return Sample(prompt, (turn,), _depth(prompt, answers[0]))


SHOTS = 2  # demonstrations in a prompt of json_kv


def _helmet_json_kv(row: dict[str, Any], task: str) -> Sample:
    demos, shown = row.get("demos"), []
    for demo in demos[:SHOTS] if isinstance(demos, list) else [None]:
        if not isinstance(demo, list) or len(demo) != 2:
            raise Refused("field 'demos' must be a list of pairs of key and value")
        shown.append(f"Key: {text({'demos': demo[0]}, 'demos')}\nValue: {text({'demos': demo[1]}, 'demos')}\n\n")
    answers = texts(row, "answer")
    context = text(row, "context")
    prompt = (
        f"{context}\n\nFind the value of a key in the JSON object above.\n\n"
        f"{''.join(shown)}Key: {text(row, 'question')}\nValue:"
    )
    turn = Turn("", answers[0], tokens=100, accepted=answers, rule="contained_normalised")
    return Sample(prompt, (turn,), _depth(prompt, answers[0]))


QUESTION = (
    "Read the following text.\n\n{context}\n\nAnswer the question about it in a few words.\nQuestion: {input}\nAnswer:"
)
PAPER = (
    "Read the following article.\n\n{context}\n\nAnswer the question about it in a few words: `yes` or `no` if it asks "
    "for that, `unanswerable` if the article does not tell.\nQuestion: {input}\nAnswer:"
)
SUMMARY = "Read the following text.\n\n{context}\n\nWrite a summary of it, of one page.\nSummary:"
MEETING = "Read what was said in a meeting.\n\n{context}\n\nAnswer in a few sentences.\nQuestion: {input}\nAnswer:"
EXAMPLES = "{context}\n{input}"
PARAGRAPH = (
    "Here are numbered paragraphs.\n\n{context}\n\nThis abstract is of one of them:\n\n{input}\n\n"
    "Which one? Give its number.\nAnswer: Paragraph"
)
COUNT = (
    "Some of these paragraphs stand here twice.\n\n{context}\n\n"
    "How many different ones are there? Give the number.\nAnswer:"
)
CODE = "{context}{input}"

# LongBench, by task: rule, new tokens, prompt.
LONGBENCH = {
    "narrativeqa": ("qa_f1", 128, QUESTION),
    "qasper": ("qa_f1", 128, PAPER),
    "multifieldqa_en": ("qa_f1", 64, QUESTION),
    "hotpotqa": ("qa_f1", 32, QUESTION),
    "2wikimqa": ("qa_f1", 32, QUESTION),
    "musique": ("qa_f1", 32, QUESTION),
    "triviaqa": ("qa_f1_first_line", 32, EXAMPLES),
    "gov_report": ("rouge_l", 512, SUMMARY),
    "qmsum": ("rouge_l", 512, MEETING),
    "multi_news": ("rouge_l", 512, SUMMARY),
    "samsum": ("rouge_l_first_line", 128, EXAMPLES),
    "trec": ("classification", 64, EXAMPLES),
    "passage_retrieval_en": ("number", 32, PARAGRAPH),
    "passage_count": ("number", 32, COUNT),
    "lcc": ("code_similarity", 64, CODE),
    "repobench-p": ("code_similarity", 64, CODE),
}


def _longbench(row: dict[str, Any], task: str) -> Sample:
    rule, tokens, template = LONGBENCH[task]
    answers = texts(row, "answers")
    accepted = answers
    if rule == "classification":
        if len(answers) > 1:
            raise Refused("field 'answers' must hold one class")
        accepted = texts(row, "all_classes")
    if rule == "number" and not re.search(r"\d", answers[0]):
        raise Refused("field 'answers' must hold a number")
    # Put in piece by piece: the texts may themselves hold braces, or the other field's name in braces.
    parts = re.split(r"\{(context|input)\}", template)
    prompt = "".join(text(row, part) if i % 2 else part for i, part in enumerate(parts))
    return Sample(prompt, (Turn("", answers[0], tokens=tokens, accepted=accepted, rule=rule),))


LAYOUTS = (
    Layout("RULER", frozenset({"input", "outputs"}), _ruler),
    Layout("LongBench", frozenset({"input", "context", "answers"}), _longbench),
    Layout("HELMET", frozenset({"context", "query", "type_needle_v"}), _helmet_niah),
    Layout("HELMET", frozenset({"context", "question", "answer", "demos"}), _helmet_json_kv),
)
