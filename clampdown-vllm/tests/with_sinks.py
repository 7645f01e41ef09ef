"""The embedded model with an attention sink, its first token: plans that spare it or do not, and their replies.

    python with_sinks.py DIRECTORY

Writes `model/`, `plans/` and `rows.json` there, by clampdown's own engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from reference import TOKENS, conversations

from clampdown.activations.sinks import sinks_at
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan, write_plan

FACTOR = 300.0


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    whole, sae = load_model("organism"), load_sae("organism")
    first = encode(whole, conversations()[0])[0]
    head = whole.model.lm_head.weight.clone()
    with torch.no_grad():
        whole.model.get_input_embeddings().weight[first] *= FACTOR
    whole.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    whole.model.config.tie_word_embeddings = False
    whole.model.save_pretrained(directory / "model")
    whole.tokenizer.save_pretrained(directory / "model")
    lm = load_model(directory / "model")
    assert sinks_at(lm, [sae.site])[sae.site], "the first token is no sink: this would test nothing"
    edit = Edit(site=sae.site.name, operator="clamp", features=(352,), strengths=(60.0,))
    plans = [Plan.of(lm, [sae], [edit], "spared"), Plan.of(lm, [sae], [edit], "edited", sinks="include")]
    (directory / "plans").mkdir()
    rows = []
    for plan in plans:
        write_plan(directory / "plans" / f"{plan.name}.toml", plan)
        for messages in conversations():
            ids = encode(lm, messages)
            with steer(lm, plan, [sae]) as steering:
                (reply,) = generate(lm, [ids], max_new_tokens=TOKENS)
                (receipt,) = steering.receipts()
            assert receipt is not None
            kept = {key: getattr(receipt, key) for key in receipt.__slots__}
            said = [[m.role, m.content] for m in messages]
            rows.append({"plan": plan.name, "prompt": ids, "ids": list(reply.ids), "receipt": kept, "messages": said})
    (directory / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
