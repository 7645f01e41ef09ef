"""Reading a conversation turn by turn: its windows (`windows.py`) through the model, up to the gate's site.

The score of a conversation is the largest of its windows' (`turns = "worst"`): it never falls as the conversation goes
on, so a bound on benign conversations of n turns holds for every shorter one. A gate that turns refusals down reads the
last turn (`turns = "last"`) and keeps the smallest: all of what is asked now must look harmless.

The windows have a pass of their own, before the prompt's. What one window scored is remembered, so a conversation that
goes on costs its new turn only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clampdown.activations.capture import DEFAULT_TOKENS_PER_BATCH, length_buckets, visit_sites
from clampdown.models.chat import Ids, encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.gate_kinds import COMBINATIONS, external_score
from clampdown.steering.gate_programs import GateProgram, gate_program, sink_limit
from clampdown.steering.ownership import aside
from clampdown.steering.plan import Gate
from clampdown.steering.program import Rows
from clampdown.steering.windows import Conversation, LoneTurn, Window, conversation
from clampdown.store import content_hash
from clampdown.types import Prompt

REMEMBERED = 1 << 14
"""Scores of windows that are kept per model."""

Vectors = Mapping[str, tuple[float, ...]]
TokenizedPrompt = tuple[Sequence[int], Sequence[bool]]
"""Ids and which of them are content, without padding."""


@dataclass(frozen=True, slots=True)
class GateReading:
    """What a gate made of one conversation: the score that counts, the turn that gave it, how many turns there were,
    whether that is more than the gate was calibrated on, whether the gate opens, and the factor of its edits then."""

    score: float
    turn: int
    turns: int
    beyond: bool
    opens: bool
    factor: float = 1.0


def judge(gate: Gate, found: Conversation, scores: Sequence[float]) -> GateReading:
    """From the windows' scores to the conversation's."""
    last = found.windows[-1].turn
    if gate.turns == "worst":
        at = max(range(len(scores)), key=lambda i: scores[i])
    else:
        at = min((i for i, window in enumerate(found.windows) if window.turn == last), key=lambda i: scores[i])
    beyond = gate.turns_calibrated > 0 and (found.cut or len(found.windows) > gate.turns_calibrated)
    opens = scores[at] > gate.threshold or (beyond and gate.when_in_doubt == "steer")
    return GateReading(scores[at], found.windows[at].turn, found.turns, beyond, opens, gate.factor(scores[at]))


def read_ahead(
    lm: LanguageModel,
    rows: Rows,
    saes: Mapping[str, FeatureSource],
    prompts: Sequence[TokenizedPrompt],
    prompt_of: Sequence[int],
) -> dict[tuple[int, int], GateReading]:
    """By branch and row, what the rows' windowed gates say of their prompts; except of prompts that are one window,
    which are read in their own pass."""
    alike: dict[tuple[int, int], list[int]] = {}
    for row, plan in enumerate(rows):
        for branch, gate in enumerate(plan.gates if plan is not None else ()):
            if gate.window:
                alike.setdefault((id(plan), branch), []).append(row)
    found: dict[tuple[int, int], GateReading] = {}
    for (_, branch), mine in alike.items():
        plan = rows[mine[0]]
        assert plan is not None, "only plans have gates"
        gate = plan.gates[branch]
        talks = {row: conversation(LoneTurn.of(lm), *prompts[prompt_of[row]], gate.window) for row in mine}
        talks = {row: talk for row, talk in talks.items() if not talk.whole or not gate.site}
        read = _read(reader_of(lm, gate, plan.vectors, saes, plan.sinks), gate, list(talks.values()))
        found |= {(branch, row): reading for row, reading in zip(talks, read, strict=True)}
    return found


def read_prompts(
    lm: LanguageModel, gate: Gate, vectors: Vectors, sae: FeatureSource | None, prompts: Sequence[Prompt]
) -> list[GateReading]:
    """What a windowed gate says of prompts, as it does when they are steered."""
    return _read(reader_of(lm, gate, vectors, _by_site(sae)), gate, _conversations(lm, gate, prompts))


def _read(reader: ReadWindows, gate: Gate, talks: Sequence[Conversation]) -> list[GateReading]:
    """All windows of all conversations in one go."""
    scores = iter(reader([window for talk in talks for window in talk.windows]))
    return [judge(gate, talk, [next(scores) for _ in talk.windows]) for talk in talks]


def window_scores(
    lm: LanguageModel, gate: Gate, vectors: Vectors, sae: FeatureSource | None, prompts: Sequence[Prompt]
) -> tuple[Float[np.ndarray, " windows"], Int[np.ndarray, " windows"]]:
    """The score of every window of the prompts, and the number of the prompt that it is from."""
    talks = _conversations(lm, gate, prompts)
    scores = reader_of(lm, gate, vectors, _by_site(sae))([window for talk in talks for window in talk.windows])
    owner = [number for number, talk in enumerate(talks) for _ in talk.windows]
    return np.array(scores, dtype=float), np.array(owner, dtype=np.int64)


def _conversations(lm: LanguageModel, gate: Gate, prompts: Sequence[Prompt]) -> list[Conversation]:
    lone, found = LoneTurn.of(lm), []
    for prompt in prompts:
        ids = torch.tensor([encode(lm, prompt.messages)])
        content = lm.chat.content_mask(ids, torch.ones_like(ids))[0].tolist()
        found.append(conversation(lone, ids[0].tolist(), content, gate.window))
    return found


def _by_site(sae: FeatureSource | None) -> dict[str, FeatureSource]:
    return {} if sae is None else {sae.cfg.site.name: sae}


ReadWindows = Callable[[Sequence[Window]], list[float]]


def reader_of(
    lm: LanguageModel, gate: Gate, vectors: Vectors, saes: Mapping[str, FeatureSource], sinks: str = "leave_out"
) -> ReadWindows:
    """What scores windows by a gate; by an ensemble's members, each with a pass up to its own site."""
    if not gate.members:
        return WindowReader(lm, gate, vectors, saes.get(gate.site), sinks)
    readers = [reader_of(lm, member, vectors, saes, sinks) for member in gate.members]
    combined = COMBINATIONS[gate.combine]

    def read(windows: Sequence[Window]) -> list[float]:
        return [combined(scores) for scores in zip(*(reader(windows) for reader in readers), strict=True)]

    return read


_SCORES: WeakKeyDictionary[object, OrderedDict[tuple[str, Ids], float]] = WeakKeyDictionary()


class WindowReader:
    """Scores windows by one gate, and remembers them."""

    def __init__(
        self, lm: LanguageModel, gate: Gate, vectors: Vectors, sae: FeatureSource | None, sinks: str = "leave_out"
    ) -> None:
        self._lm, self._gate, self._vectors, self._sae, self._sinks = lm, gate, vectors, sae, sinks

    def __call__(self, windows: Sequence[Window]) -> list[float]:
        if self._gate.scorer:
            return [external_score(self._gate.scorer, self._text(window)) for window in windows]
        key, known = self._key(), _SCORES.setdefault(self._lm.model, OrderedDict())
        found = {window.ids: known.get((key, window.ids)) for window in windows}
        new = list({window.ids: window for window in windows if found[window.ids] is None}.values())
        found.update(zip((window.ids for window in new), self._read(new), strict=True))
        known.update({(key, ids): score for ids, score in found.items() if score is not None})
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        return [score for window in windows if (score := found[window.ids]) is not None]

    def _text(self, window: Window) -> str:
        inside = [token for token, counted in zip(window.ids, window.content, strict=True) if counted]
        return self._lm.tokenizer.decode(inside, skip_special_tokens=True)

    def _key(self) -> str:
        """Everything that makes a window's score. Of the model's weights, torch counts the changes."""
        reads = {"site", "kind", "features", "weights", "bias", "poolings"}
        vectors = [self._vectors[name] for name in self._gate.vectors]
        changed = sum(parameter._version for parameter in self._lm.model.parameters())
        sae = self._sae.revision if self._sae is not None else ""
        where = [str(self._lm.device), self._sinks]
        return content_hash([self._gate.model_dump(include=reads), vectors, sae, changed, where])

    def _read(self, windows: Sequence[Window]) -> list[float]:
        """A truncated pass, in which no hook of a `steer` block acts."""
        scores = [0.0] * len(windows)
        if windows:
            with aside(id(self._lm.layout.decoder)):
                limit = sink_limit(self._lm, self._gate, self._sinks)
                program = gate_program(self._gate, self._vectors, self._sae, self._lm.device, limit)
                for rows in length_buckets([len(window.ids) for window in windows], DEFAULT_TOKENS_PER_BATCH):
                    for row, score in zip(rows, self._batch(program, [windows[row] for row in rows]), strict=True):
                        scores[row] = score
        return scores

    def _batch(self, program: GateProgram, windows: Sequence[Window]) -> list[float]:
        batch = pad_left([window.ids for window in windows], self._lm.pad_id, self._lm.device)
        width = batch.input_ids.shape[1]
        padded = [(*(False for _ in range(width - len(w.content))), *w.content) for w in windows]
        content = torch.tensor(padded, device=self._lm.device)
        found: list[Tensor] = []
        visit_sites(self._lm, batch, {program.site: lambda x: found.append(program.scores(x, content))})
        return found[0].tolist()
