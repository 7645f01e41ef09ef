"""Every `clampdown ...` command that a page of the documentation shows, as words: from fenced shell blocks, whole; from
running text, its command and options.

    python -m tests.doc_commands docs/learn/first-hour.md

runs a page's commands in their order in an empty directory, and stops at the first that fails. Commands with a name in
capitals (`--model DIR`) are for the reader to fill in; those that serve do not end, and `monitor` reads what a
server wrote: they are left out, and said.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(?:sh|shell|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(clampdown [^`]+)`")
ANY_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?:^|[\s/])clampdown\s")
STOPS = {"|", ">", ">>", "&&", ";", "&", "||"}
NOT_ALONE = {"serve", "studio", "label", "monitor"}


@dataclass(frozen=True, slots=True)
class Shown:
    """A command as a page shows it; `whole` in a shell block, where it has to run as it stands."""

    page: Path
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page.name}: clampdown {' '.join(self.words)}"

    @property
    def to_be_filled_in(self) -> bool:
        return any(re.search(r"\b[A-Z]{2,}\b", word) or "..." in word for word in self.words)


def commands_of(page: Path) -> Iterator[Shown]:
    """In the order of the page, shell blocks first."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        for line in filter(NAMED.search, block.replace("\\\n", " ").splitlines()):
            yield from (Shown(page, words, True) for words in _in_line(line))
    for span in INLINE.findall(ANY_BLOCK.sub("", text)):
        yield Shown(page, tuple(shlex.split(span.replace("[", "").replace("]", "").replace("'", ""))[1:]), False)


def _in_line(line: str) -> Iterator[tuple[str, ...]]:
    """A line may hold several commands, joined as a shell does. What a shell makes up, `$(...)`, nobody can know."""
    if "$(" in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[str] = []
    for word in [*lexer, ";"]:
        if word not in STOPS:
            found += [] if not found and "=" in word else [word]  # without variables before a command
            continue
        if found and found[0].split("/")[-1] == "clampdown":
            yield tuple(found[1:])
        found = []


def main(pages: list[str]) -> int:
    """Run them; the number of commands that failed, one at most per page."""
    failed = 0
    for page in map(Path, pages):
        with tempfile.TemporaryDirectory() as directory:
            for shown in (shown for shown in commands_of(page.resolve()) if shown.whole):
                if shown.to_be_filled_in or shown.words[0] in NOT_ALONE:
                    sys.stdout.write(f"left out: {shown}\n")
                    continue
                command = [sys.executable, "-m", "clampdown", *shown.words]
                done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
                sys.stdout.write(f"{'ran' if done.returncode == 0 else f'exit {done.returncode}'}: {shown}\n")
                if done.returncode:
                    sys.stdout.write(done.stderr[-2000:])
                    failed += 1
                    break
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
