"""Language modelling on text that every machine with Python has: the interpreter's own standard library.

Gives turns of kind `text`: a prompt of code and comments as they stand, and the tokens that follow it. The samples
are the same wherever the Python release is the same; it is told in each sample's facts.
"""

from __future__ import annotations

import platform
import random
import sysconfig
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.evaluation.samples import TEXT, Sample, Turn
from kvcompile.evaluation.suites.generated import Generated
from kvcompile.evaluation.suites.options import number
from kvcompile.kernels.errors import KvCompileError

_MODULES = (  # files, without .py
    "abc argparse ast asyncio/base_events asyncio/events asyncio/streams asyncio/tasks base64 bdb bisect calendar cmd "
    "codecs collections/__init__ configparser contextlib copy csv dataclasses decimal difflib dis doctest "
    "email/_header_value_parser email/message enum fileinput fnmatch fractions ftplib functools gettext glob gzip "
    "hashlib heapq html/parser http/client http/cookiejar imaplib inspect ipaddress json/decoder logging/__init__ "
    "logging/handlers mailbox mimetypes ntpath numbers optparse os pathlib pdb pickle pickletools platform plistlib "
    "pprint pydoc queue random sched selectors shelve shlex shutil smtplib socket socketserver statistics string "
    "subprocess tarfile tempfile textwrap threading tokenize trace traceback turtle typing unittest/case "
    "unittest/mock urllib/parse urllib/request uuid warnings weakref xml/dom/minidom zipfile"
)
LETTERS_PER_TOKEN = 16  # more than any tokenizer gets out of a token of code, on average


@lru_cache(maxsize=128)
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def library_files() -> list[Path]:
    """The well-known modules that this interpreter has, always in the same order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path for module in _MODULES.split() if (path := folder / f"{module}.py").is_file()]


@dataclass(frozen=True, slots=True)
class LibraryText(Generated):
    """From a random line of a random module on, further modules after it where one is too short."""

    tokens: int = number(128, 1, 4096, "tokens to predict after the prompt")
    base: ClassVar[str] = "library_text"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        """`size` is letters here."""
        tail = self.tokens * LETTERS_PER_TOKEN
        files = library_files()
        rng.shuffle(files)
        if not files:
            raise KvCompileError(f"suite `{self.name}`: this Python comes without the sources of its standard library")
        text, used = "", 0
        part = rng.random() / 2  # of the first module that is left out
        while len(text) < size + tail and used < len(files):
            more = _read(files[used])
            lines = more.splitlines(keepends=True)
            text += more if used else "".join(lines[int(len(lines) * part) :])
            used += 1
        if len(text) < size + tail:
            raise KvCompileError(f"suite `{self.name}`: the standard library has no {size + tail} letters")
        prompt = _whole_words(text, size)
        follows = self._next_tokens(text[len(prompt) : len(prompt) + tail], tokenizer)
        facts = {"modules": [path.stem for path in files[:used]], "python": platform.python_version()}
        return Sample(prompt, (Turn("", follows, TEXT, self.tokens),), None, facts)

    def _next_tokens(self, text: str, tokenizer: Any) -> str:
        """The longest beginning of whole words that has at most `tokens` tokens."""
        cuts = [i for i in range(1, len(text)) if text[i].isspace() and not text[i - 1].isspace()]

        def count(cut: int) -> int:
            return len(tokenizer(text[:cut], add_special_tokens=False)["input_ids"])

        fits = bisect_right(cuts, self.tokens, key=count)
        return text[: cuts[fits - 1]] if fits else text[: cuts[0]]

    def score(self, turn: Turn, produced: str) -> float:
        raise KvCompileError(f"suite `{self.name}` is scored by logits, not by text that a model produced")


def _whole_words(text: str, size: int) -> str:
    """The first `size` letters at most, up to the end of a word; white space after it belongs to what follows."""
    cut = size
    while 0 < cut < len(text) and not text[cut].isspace():
        cut -= 1
    return text[:cut].rstrip()
