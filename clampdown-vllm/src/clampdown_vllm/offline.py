"""vLLM as the engine of `clampdown evaluate`: replies of every arm from one `LLM`, in batches as large as it likes.

The plans of a run are all known when it begins: they are written to a directory of their own, under names that are no
names of anything else, and the engine is made with them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clampdown.config import embedded_model
from clampdown.models.generation import reply_text
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.arms import Arm, EncodedRow, Reply
from clampdown.steering.plan import write_plan
from clampdown.types import Receipt

ROWS = 2048
_FIELDS = tuple(Receipt.__slots__)


class VllmEngine:
    """An engine for `clampdown.evaluation.engines`. Options are those of `vllm.LLM`."""

    rows = ROWS

    def __init__(
        self,
        lm: LanguageModel,
        saes: Sequence[FeatureSource],
        arms: Sequence[Arm],
        longest: int,
        options: Mapping[str, Any],
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        self._lm, self._sampling = lm, vllm.SamplingParams
        plans = {arm.plan.digest: arm.plan for arm in arms if arm.plan is not None}
        self._names = {digest: f"plan-{i}" for i, digest in enumerate(plans)}
        self._directory = tempfile.TemporaryDirectory()
        for digest, plan in plans.items():
            name = self._names[digest]
            write_plan(Path(self._directory.name, f"{name}.toml"), plan.named(name))
        self.label = f"vllm {vllm.__version__} {lm.dtype}"
        settings = {"plans": self._directory.name, "saes": [sae.name for sae in saes]}
        config = {"clampdown": settings} if plans else {}
        given = {"dtype": str(lm.dtype).removeprefix("torch."), "max_model_len": longest, **options}
        self._llm = vllm.LLM(model=str(embedded_model(lm.name) or lm.name), additional_config=config, **given)

    def replies(self, batch: Sequence[EncodedRow], max_new_tokens: int) -> list[Reply]:
        """Greedy, ended as this package's own engine ends them."""
        params = [self._params(arm, max_new_tokens) for arm, _, _ in batch]
        prompts = [{"prompt_token_ids": list(ids)} for _, _, ids in batch]
        outs = self._llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        return [self._reply(row, out) for row, out in zip(batch, outs, strict=True)]

    def _params(self, arm: Arm, max_new_tokens: int) -> Any:
        extra = {"clampdown": self._names[arm.plan.digest]} if arm.plan is not None else None
        ends = sorted(self._lm.eos_ids)
        return self._sampling(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=ends, detokenize=False, extra_args=extra
        )

    def _reply(self, row: EncodedRow, out: Any) -> Reply:
        arm, prompt, ids = row
        written = [token for token in out.outputs[0].token_ids if token not in self._lm.eos_ids]
        receipt = None
        if arm.plan is not None:
            found = {key: out.steering[key] for key in _FIELDS if key in out.steering}
            two_sided = arm.plan.otherwise is not None
            receipt = Receipt(**{**found, "plan": arm.plan.name, "branch": found["branch"] if two_sided else None})
        return Reply(arm, prompt, reply_text(self._lm.tokenizer, ids, written), len(written), receipt)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._directory.cleanup()
