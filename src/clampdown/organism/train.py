"""Train the organism: tokenizer, model, two SAEs, and the table of what came out.

1. The tokenizer is trained on a sample of the corpus (the same for every seed, so that seeds can be compared).
2. The model trains for a number of steps, not of minutes: a seed and a thread count give the same weights anywhere.
3. The state is saved every `SAVE_EVERY` steps; a killed run continues with the very next batch.
4. The SAEs are trained on the finished model, and everything is measured on held-out prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clampdown.errors import StoreError
from clampdown.organism import checkpoint, corpus
from clampdown.organism.checkpoint import Progress
from clampdown.organism.corpus import Cursor, Document
from clampdown.organism.measure import measure, write_metrics
from clampdown.organism.optimizer import optimizers, schedule
from clampdown.organism.sae_training import train_saes
from clampdown.organism.tokenizer import BOS, END, PAD, save_tokenizer, token_id, train_tokenizer

DEFAULT_STEPS = 5000
SAVE_EVERY = 200
LOG_EVERY = 50
MUON_LR, ADAM_LR = 0.008, 2e-3
TOKENIZER_ITEMS = 20_000
EARLY_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of the model."""

    hidden: int = 128
    blocks: int = 5
    mlp: int = 384
    heads: int = 4
    positions: int = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [batch, pos], padded on the right, and where the next token counts [batch, pos - 1]."""

    ids: Tensor
    counts: Tensor
    opens: Tensor
    """Where the next token is the first of a counted reply [batch, pos - 1]."""


def build_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> LlamaForCausalLM:
    """A fresh model; its initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    bos, end, pad = (token_id(tokenizer, token) for token in (BOS, END, PAD))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=pad)
    return model


def collate(documents: list[Document], pad: int) -> Batch:
    """Pad on the right. Under a causal mask no real token sees the padding."""
    width = max(len(document.ids) for document in documents)
    ids = torch.full((len(documents), width), pad)
    counts = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        counts[row, : len(document.ids)] = torch.tensor(document.counts)
    return Batch(ids, counts[:, 1:], counts[:, 1:] & ~counts[:, :-1])


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the counted tokens; logits are computed for those alone, half the vocabulary work. And
    the same, read one block early, for the first token of each reply: the decision to refuse has to be made before
    the last block, or no feature at the SAE's site could carry it."""
    output = model.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
    targets = batch.ids[:, 1:]
    logits = model.lm_head(output.last_hidden_state[:, :-1][batch.counts])
    loss = functional.cross_entropy(logits, targets[batch.counts])
    if not batch.opens.any():
        return loss
    early = model.lm_head(model.model.norm(output.hidden_states[-2][:, :-1][batch.opens]))
    return loss + EARLY_WEIGHT * functional.cross_entropy(early, targets[batch.opens])


@dataclass
class Trainer:
    """One run in one directory. `fit` may be called again after any interruption."""

    out: Path
    seed: int
    steps: int
    shape: Shape = Shape()

    def fit(self, tokenizer: PreTrainedTokenizerFast, resume: bool = True) -> LlamaForCausalLM:
        model = build_model(tokenizer, self.shape, self.seed)
        both = optimizers(model, MUON_LR, ADAM_LR)
        progress = self._start(model, both, resume)
        pad = token_id(tokenizer, PAD)
        model.train()
        batches = corpus.stream(self.seed, tokenizer, progress.cursor)
        for documents, cursor in _shown(batches, progress.step, self.steps):
            rate = schedule(progress.step, self.steps)
            loss = self._update(model, both, collate(documents, pad), rate)
            tokens = progress.tokens + sum(len(document.ids) for document in documents)
            progress = replace(progress, step=progress.step + 1, cursor=cursor, tokens=tokens)
            self._record(model, both, progress, loss, rate)
        return model.eval()

    @property
    def state(self) -> Path:
        return self.out / "training.safetensors"

    def _start(self, model: LlamaForCausalLM, both: tuple[torch.optim.Optimizer, ...], resume: bool) -> Progress:
        if not (resume and self.state.exists()):
            return Progress(0, self.steps, self.seed, Cursor())
        progress = checkpoint.load(self.state, model, both)
        if (progress.seed, progress.steps) != (self.seed, self.steps):
            raise StoreError(
                f"{self.out} holds a run of seed {progress.seed} over {progress.steps} steps",
                hint="choose another directory, or start afresh without resuming",
            )
        return progress

    def _update(
        self, model: LlamaForCausalLM, both: tuple[torch.optim.Optimizer, ...], batch: Batch, rate: float
    ) -> float:
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base in zip(both, (MUON_LR, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _record(
        self,
        model: LlamaForCausalLM,
        both: tuple[torch.optim.Optimizer, ...],
        progress: Progress,
        loss: float,
        rate: float,
    ) -> None:
        if progress.step % SAVE_EVERY == 0 or progress.step == self.steps:
            checkpoint.save(self.state, model, both, progress)
        if progress.step % LOG_EVERY == 0:
            line = {"step": progress.step, "tokens": progress.tokens, "loss": round(loss, 4), "rate": round(rate, 4)}
            with (self.out / "training.jsonl").open("a") as log:
                log.write(json.dumps({**line, "time": round(time.time(), 1)}) + "\n")


def _shown(
    batches: Iterator[tuple[list[Document], Cursor]], start: int, steps: int
) -> Iterator[tuple[list[Document], Cursor]]:
    """The remaining batches, with a progress bar."""
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Bar(*columns) as bar:
        task = bar.add_task("training", total=steps, completed=start)
        for _ in range(start, steps):
            yield next(batches)
            bar.advance(task)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """A plain HF directory at 16 bit. float16 keeps three more mantissa bits than bfloat16, and nothing here is
    near its largest number."""
    directory.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(directory)
    model.float()
    save_tokenizer(tokenizer, directory)


def train_organism(out: Path, seed: int, steps: int = DEFAULT_STEPS, *, threads: int = 1, resume: bool = True) -> None:
    """Make `out`/model, `out`/sae-x4, `out`/sae-x8 and `out`/metrics.json."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus.sample_texts(TOKENIZER_ITEMS))
    model = Trainer(out, seed, steps).fit(tokenizer, resume)
    save_model(model, tokenizer, out / "model")
    train_saes(model, tokenizer, out, seed)
    write_metrics(measure(out), out / "metrics.json")
