"""Write the model's own replies to some of the requests that texts.py wrote: greedy, 48 tokens, to the shorter ones.

python own_replies.py MODEL OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import load_model
from clampdown.types import Message

OFFERED, TAKEN, BATCH = 176, 160, 16

if __name__ == "__main__":
    model, out = sys.argv[1], Path(sys.argv[2])
    lm = load_model(model, dtype="bfloat16")
    lines = (out / "asked.jsonl").read_text(encoding="utf-8").splitlines()[:OFFERED]
    asked = sorted((json.loads(line)["messages"] for line in lines), key=lambda m: len(m[-1]["content"]))[:TAKEN]
    with (out / "own_replies.jsonl").open("w", encoding="utf-8") as handle:
        for start in range(0, TAKEN, BATCH):
            part = asked[start : start + BATCH]
            ids = [encode(lm, [Message(m["role"], m["content"]) for m in messages]) for messages in part]
            for messages, reply in zip(part, generate(lm, ids, max_new_tokens=48), strict=True):
                row = {"messages": [*messages, {"role": "assistant", "content": reply.text}]}
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
