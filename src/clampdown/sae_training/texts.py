"""The text that an SAE is trained and measured on: chat-formatted conversations and plain text, and their mix.

A row of a data file is one of three things, by its columns: a conversation (`messages`), a prompt with or without a
reply (`prompt`; `reply`, `response`, `completion` or `answer`), or plain text (`text`). `.txt` and `.md` files are
plain text, cut into pieces. Conversations go through the chat template: the SAE sees what the model sees in use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.errors import PromptSetError
from clampdown.evaluation.rows import Row, read_rows
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.types import Message

PLAIN = (".txt", ".md")
PIECE = 1200
"""Characters per piece of a plain text file: about 300 tokens."""
_PROMPTS = ("prompt", "question", "goal", "instruction")
_REPLIES = ("reply", "response", "completion", "answer", "target")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Text:
    """One text before it is tokens. `messages` is empty for plain text."""

    source: str
    messages: tuple[Message, ...] = ()
    plain: str = ""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One text as token ids."""

    text: Text
    ids: tuple[int, ...]

    @property
    def source(self) -> str:
        return self.text.source


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """All texts of the files, in order. Raises `PromptSetError` for a file that cannot be read, with the line."""
    texts = [text for path in paths for text in _read(path)]
    if not texts:
        raise PromptSetError("no text to read", hint="give JSONL, CSV, .txt or .md files")
    return texts


def _read(path: Path) -> Iterator[Text]:
    if path.suffix.lower() in PLAIN:
        yield from _pieces(path)
        return
    for row in read_rows(path):
        yield _of_row(row)


def _pieces(path: Path) -> Iterator[Text]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptSetError(f"cannot read {path}: {error}") from error
    for start in range(0, len(content), PIECE):
        if piece := content[start : start + PIECE].strip():
            yield Text(path.stem, plain=piece)


def _of_row(row: Row) -> Text:
    if row.cells.get("messages"):
        return Text(row.stem, messages=_messages(row))
    if row.text("text"):
        return Text(row.stem, plain=row.needed("text"))
    prompt = next((found for name in _PROMPTS if (found := row.text(name))), None)
    if prompt is None:
        row.fail("neither 'messages', 'prompt' nor 'text'", hint=f"columns: {', '.join(map(str, row.cells))}")
    reply = next((found for name in _REPLIES if (found := row.text(name))), None)
    user = Message("user", prompt)
    return Text(row.stem, messages=(user,) if reply is None else (user, Message("assistant", reply)))


def _messages(row: Row) -> tuple[Message, ...]:
    found = row.structure("messages", list, "a list of messages")
    for message in found:
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not message.get("content"):
            row.fail("'messages' should hold objects with a role (system, user, assistant) and content")
    return tuple(Message(message["role"], str(message["content"])) for message in found)


def without(texts: Sequence[Text], kept_out: Sequence[Text]) -> list[Text]:
    """The texts that contain none of the requests of `kept_out`, such as a study's test prompts.

    Case and white space do not count, and a wrapped request is found in its wrapper."""
    requests = {_plain(message.content) for text in kept_out for message in text.messages if message.role == "user"}
    requests.discard("")
    return [text for text in texts if not _holds(_everything(text), requests)]


def _holds(text: str, requests: set[str]) -> bool:
    return any(request in text for request in requests)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _everything(text: Text) -> str:
    return _plain(text.plain or " ".join(message.content for message in text.messages))


def tokenized(lm: LanguageModel, texts: Sequence[Text], context: int) -> list[TokenRow]:
    """Every text as ids, at most `context` of them. A conversation that ends with the user is opened for the reply."""
    return [TokenRow(text, tuple(_ids(lm, text)[:context])) for text in texts]


def _ids(lm: LanguageModel, text: Text) -> list[int]:
    if text.messages:
        return encode(lm, text.messages, add_generation_prompt=text.messages[-1].role == "user")
    return list(lm.tokenizer(text.plain).input_ids)


def shuffled(sequences: Sequence[TokenRow], seed: int) -> list[TokenRow]:
    """All of them in an order that mixes the sources, so that any part of the collection is a fair sample."""
    order = list(sequences)
    random.Random(seed).shuffle(order)
    return order


def mix(sequences: Sequence[TokenRow]) -> dict[str, dict[str, int]]:
    """Texts and tokens of every source."""
    found: dict[str, dict[str, int]] = {}
    for sequence in sequences:
        row = found.setdefault(sequence.source, {"texts": 0, "tokens": 0})
        row["texts"] += 1
        row["tokens"] += len(sequence.ids)
    return dict(sorted(found.items()))


def first_requests(texts: Sequence[Text], n: int, seed: int) -> list[Text]:
    """At most `n` different requests: conversations cut after their first user turn, drawn over all sources."""
    found: dict[str, Text] = {}
    for text in texts:
        last = next((i for i, message in enumerate(text.messages) if message.role == "user"), None)
        if last is not None:
            found.setdefault(text.messages[last].content, Text(text.source, messages=text.messages[: last + 1]))
    requests = list(found.values())
    random.Random(seed).shuffle(requests)
    return requests[:n]
