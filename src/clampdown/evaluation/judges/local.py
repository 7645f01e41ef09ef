"""A language model on this machine that judges: its inputs are read in batches, its outputs are parsed.

An input longer than the model reads is unscored, and so is an output that its format does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from clampdown.evaluation.judges.interface import Finding
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.types import Judgement, Message, Verdict

_BATCH_ROWS = 8
Input = str | tuple[Message, ...]
"""Raw text, which holds its own special tokens, or a conversation for the model's chat template."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A loaded model as judge."""

    lm: LanguageModel
    max_new_tokens: int

    def find(self, inputs: Sequence[Input], parse: Callable[[str], Judgement | None]) -> Iterator[Finding]:
        """One finding per input, in any order."""
        rows = [(index, self._encoded(given)) for index, given in enumerate(inputs)]
        room = self._longest() - self.max_new_tokens
        for index, ids in rows:
            if len(ids) > room:
                detail = f"{len(ids)} tokens are more than the classifier reads ({room})"
                yield Finding(index, Judgement(Verdict.UNSCORED, detail=detail))
        fitting = sorted((row for row in rows if len(row[1]) <= room), key=lambda row: len(row[1]))
        for start in range(0, len(fitting), _BATCH_ROWS):
            chunk = fitting[start : start + _BATCH_ROWS]
            outputs = generate(self.lm, [ids for _, ids in chunk], max_new_tokens=self.max_new_tokens)
            for (index, _), output in zip(chunk, outputs, strict=True):
                yield Finding(index, parse(output.text) or unread(output.text))

    def _encoded(self, given: Input) -> list[int]:
        if isinstance(given, str):
            return list(self.lm.tokenizer.encode(given, add_special_tokens=False))
        return encode(self.lm, given)

    def _longest(self) -> int:
        return int(getattr(self.lm.model.config, "max_position_embeddings", None) or 4096)


def unread(output: str) -> Judgement:
    """What no format knows decides nothing."""
    return Judgement(Verdict.UNSCORED, detail=f"the classifier said {output.strip()[:120]!r}")
