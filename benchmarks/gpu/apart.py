"""Rows in a process of their own: one that fails on the device, hangs or dies costs its figures and no other's.

`Apart.row` takes a part's name and a cell, gives figures and status; `serve` is the other end. The process is kept from
row to row while it is well, so that what it has compiled stays; an error on the device ends it, as nothing runs there
any more.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

MARK = "row: "  # before an answer, as libraries print, too
Row = tuple[dict[str, Any] | None, str]  # figures, status


class Apart:
    """Measures rows by `command`, a process that runs `serve`."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def row(self, part: str, cell: dict[str, Any], seconds: float) -> Row:
        """Figures and status; no later than `seconds` from now."""
        child = self._begun()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps({"part": part, "cell": cell}) + "\n")
            child.stdin.flush()
            answer = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.end()
            return None, f"failed: it took longer than {seconds:.0f} s"
        except OSError:
            answer = None
        if answer is None:
            status = child.wait()
            self.end()
            return None, f"failed: its process ended with status {status}"
        found = json.loads(answer)
        if found["ends"]:
            self.end()
        return found["figures"], found["status"]

    def end(self) -> None:
        """Stop the process, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = None

    def _begun(self) -> subprocess.Popen[str]:
        if self._child is None:
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
            self._answers = queue.Queue()
            threading.Thread(target=_listen, args=(self._child, self._answers), daemon=True).start()
        return self._child


def _listen(child: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(MARK):
            answers.put(line.removeprefix(MARK))
        else:
            print(line, end="", file=sys.stderr, flush=True)
    answers.put(None)


def serve(measure: Callable[[str, dict[str, Any]], Row], well: Callable[[], bool], asked: Iterable[str]) -> None:
    """Answer each line of `asked` on stdout; the last one where the device is not `well` after it."""
    for line in asked:
        wanted = json.loads(line)
        figures, status = measure(wanted["part"], wanted["cell"])
        ends = not well()
        print(MARK + json.dumps({"figures": figures, "status": status, "ends": ends}), flush=True)
        if ends:
            return
