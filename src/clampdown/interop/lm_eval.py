"""lm-evaluation-harness runs its tasks on a steered model: `--model clampdown --model_args plan=plan.toml`.

The harness (0.4.13) finds models in its own table only: it reads no entry points. Importing this module adds the row,
and `python -m clampdown.interop.lm_eval ...` is the harness's command line with that row in it.

1. Multiple choice: every (context, continuation) in one left-padded pass, the context being the plan's prompt.
2. Generation: greedy, or sampled where a task asks for it; replies end at the first stop string.
3. Perplexity of running text has no prompt: only ungated plans of scope `all` can act there, others are refused.
4. What was done is in the results (`config`): the plan, and how many requests it touched and by how much.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from clampdown.errors import ClampdownError, ModelError, PlanError
from clampdown.extras import extra
from clampdown.interop.steered import Decoding, Ids, SteeredModel, load_steered
from clampdown.models.chat import render
from clampdown.types import Message, Receipt

with extra("lm-eval", "the model of lm-evaluation-harness"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook, TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

log = logging.getLogger(__name__)

DEFAULT_BATCH = 64
_KNOWN_KWARGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"}


class Ledger:
    """Running totals of receipts, for the harness's results file."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.edit = 0.0

    def add(self, receipt: Receipt | None) -> None:
        """Count one request."""
        self.counts["requests"] += 1
        if receipt is None:
            return
        self.counts["steered"] += receipt.tokens_touched > 0
        self.counts["tokens_touched"] += receipt.tokens_touched
        self.counts["gated"] += receipt.gate_fired is not None
        self.counts["gate_fired"] += receipt.gate_fired is True
        self.edit += receipt.edit_norm * receipt.tokens_touched

    def summary(self) -> dict[str, Any]:
        """Totals; None where there is nothing to average."""
        touched, gated = self.counts["tokens_touched"], self.counts["gated"]
        return {
            "requests": self.counts["requests"],
            "requests_steered": self.counts["steered"],
            "tokens_touched": touched,
            "mean_edit_norm": self.edit / touched if touched else None,
            "gate_fired_share": self.counts["gate_fired"] / gated if gated else None,
        }


@register_model("clampdown")
class SteeredLM(TemplateLM):
    """A model under a plan. Arguments: `plan` (a file; none is the baseline), `model`, `sae`, `device`, `dtype`,
    `batch_size` (rows per batch), `max_gen_toks` (for tasks that name no limit), `max_length`."""

    def __init__(
        self,
        plan: str | None = None,
        model: str | None = None,
        sae: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **more: Any,
    ) -> None:
        super().__init__()
        self._limits = {name: int(more.pop(name)) for name in ("max_gen_toks", "max_length") if more.get(name)}
        more.pop("max_batch_size", None)  # the harness always passes it
        if more:
            raise ModelError(
                f"model argument '{next(iter(more))}' is not known",
                hint="plan, model, sae, device, dtype, batch_size, max_gen_toks, max_length",
            )
        rows = DEFAULT_BATCH if batch_size in (None, "auto") else int(batch_size)
        self.steered: SteeredModel = load_steered(
            model, plan, sae, device=_device(device), dtype=dtype, batch_rows=rows
        )
        self.ledger = Ledger()
        self.tokenizer = self.steered.lm.tokenizer
        self._templated = False

    # ---- tokens ------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return self._limits.get("max_length", int(self.steered.lm.model.config.max_position_embeddings))

    @property
    def max_gen_toks(self) -> int:
        return self._limits.get("max_gen_toks", 256)

    @property
    def tokenizer_name(self) -> str:
        return str(self.steered.lm.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. A chat template has written its special tokens itself; a plain text gets the tokenizer's own."""
        special = not self._templated if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token
        if bos and string.startswith(bos):
            special = False
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as our own runner would write it. Raises `ChatTemplateError`."""
        self._templated = True
        if not add_generation_prompt:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True))
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        return render(self.tokenizer, turns, add_generation_prompt=True)

    # ---- what the harness calls ----------------------------------------------------------------------------------

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse the harness's answer cache under a plan: its keys do not know the plan."""
        if cache_hook.dbdict is not None and self.steered.plan is not None:
            raise PlanError(
                "--use_cache would give this plan's answers to other plans: its keys are the requests alone",
                hint="leave --use_cache out",
            )
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Multiple choice. Raises `ScopeError` for a plan that steers generated tokens."""
        self.steered.refuse_generated_scope()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_settings: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, text) for _, context, text in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="log-likelihoods") as bar:
            found = self.steered.log_likelihoods(pairs, bar.update)
        for (key, _, _), one in zip(requests, found, strict=True):
            self.ledger.add(one.receipt)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, (one.log_likelihood, one.greedy))
        return [(one.log_likelihood, one.greedy) for one in found]

    def _fitted(self, context: Ids, text: Ids) -> tuple[Ids, Ids]:
        """Cut a context from the left where the model has too few positions, as the harness does."""
        room = self.max_length + 1 - len(text)
        if room < 1:
            raise ModelError(f"a continuation of {len(text)} tokens does not fit into {self.max_length} positions")
        if len(context) > room:
            log.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:], text

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts. Raises `ScopeError` for a plan that needs a prompt."""
        self.steered.refuse_prompt_scope()
        windows: list[tuple[Any, ...]] = [
            (i, None, *make_disjoint_window(window))
            for i, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        found = self._loglikelihood_tokens([(key, head, tail) for _, key, head, tail in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (i, *_), (value, _) in zip(windows, found, strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies. Requests with the same settings are decoded together."""
        groups: dict[Decoding, list[int]] = {}
        asked: list[Any] = [request.args for request in requests]  # (context, settings)
        for i, (_, settings) in enumerate(asked):
            groups.setdefault(self._decoding(settings), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="replies") as bar:
            for decoding, rows in groups.items():
                prompts = [self._prompt_ids(asked[row][0], decoding) for row in rows]
                for row, one in zip(rows, self.steered.complete(prompts, decoding, bar.update), strict=True):
                    texts[row] = one.text
                    self.ledger.add(one.receipt)
                    self.cache_hook.add_partial("generate_until", asked[row], one.text)
        return texts

    def _decoding(self, kwargs: dict[str, Any]) -> Decoding:
        """A task's generation settings. Raises `ModelError` for one that would be ignored."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, self.max_gen_toks))
        unknown = sorted(wanted.keys() - _KNOWN_KWARGS)
        if unknown:
            raise ModelError(
                f"generation setting '{unknown[0]}' is not supported", hint=", ".join(sorted(_KNOWN_KWARGS))
            )
        return Decoding(
            max_new_tokens=wanted["max_gen_toks"],
            stops=tuple(wanted["until"]),
            temperature=float(wanted.get("temperature", 0.0)) if wanted["do_sample"] else 0.0,
            top_p=float(wanted.get("top_p", 1.0)),
            top_k=wanted.get("top_k"),
            seed=None if wanted.get("seed") is None else int(wanted["seed"]),
        )

    def _prompt_ids(self, text: str, decoding: Decoding) -> Ids:
        """A context's ids, cut from the left to leave room for the reply."""
        room = self.max_length - decoding.max_new_tokens
        if room < 1:
            raise ModelError(
                f"a reply of {decoding.max_new_tokens} tokens leaves no room for a prompt: "
                f"the model has {self.max_length} positions",
                hint="set max_gen_toks in the task, or --gen_kwargs max_gen_toks=N",
            )
        ids = self.tok_encode(text)
        if len(ids) > room:
            log.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
        return ids[-room:]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: who answered, and the receipts' totals."""
        return {"clampdown": {**self.steered.description, "steering": self.ledger.summary()}}


def _device(asked: str | None) -> str:
    """The harness asks for "cuda:0" unless told otherwise, and takes a CPU where there is none."""
    fallback = str(asked).startswith("cuda") and not torch.cuda.is_available()
    return "auto" if asked is None or fallback else asked


def main() -> None:
    """The harness's command line with our model in its table; a `ClampdownError` is one message and exit code 2."""
    with extra("lm-eval", "the harness's command line"):
        from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ClampdownError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
