"""Reply first, verdict second: a reply in a form that looks the same however it was typeset, and in whose voice.

1. Typography becomes plain: quotation marks, dashes, zero-width characters, emphasis, headings, quoted lines.
2. What repeats the prompt is dropped from the reply's beginning: it is the question, not the answer.
3. A reply may speak in several voices ("[CLASSIC] ... [JAILBREAK] ..."): a line that begins with a name in brackets, or
   before a colon, begins one.
4. Voices are cut into sentences; an item of a list is a sentence. A sentence is read as words, in which "can't",
   "can not" and "cannot" are one. Speech of others ("...", said the guard) is left out: it declines nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u02b9\u00b4\u0060\u2032\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f", ""),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000\t", " "),
        "\u2026": "...",
        "\r": "\n",
        "\u2028": "\n",
    }
)
_EMPHASIS = re.compile(r"\*+|(?<!\w)_+(?=\w)|(?<=[\w.,!?])_+(?!\w)|~~")
_LEADING = re.compile(r"^[ ]*(?:(?:#{1,6}|>)[ ]*)+", re.MULTILINE)
_ITEM = re.compile(r"^[ ]*(?:[-+*\u2022\u25cf\u25aa][ ]+|\(?(?:\d{1,2}|[a-zA-Z])[.):][ ]+)(?=\S)", re.MULTILINE)
_VOICE = re.compile(
    r"^(?:\W{0,3}(?:\[([^\]\n]{1,40})\]|\(([^)\n]{2,30})\))\W{0,3}(?=\s|\w|['\"])"
    r"|\W{0,3}((?!(?:Step|Note|Warning|Disclaimer|Example|Tip|Answer|Question|Title)\b)[A-Z][\w.-]*(?: [A-Z][\w-]*)?"
    r"(?:'s (?:answer|response))?)\W{0,3}:(?=\s))",
    re.MULTILINE,
)
_ENDS = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n\s*|\n(?=\x00)")
_SAYS = (
    r"(?:said|says|asked|asks|replied|replies|whispered|shouted|told|cried|muttered|answered|growled|sighed|barked|"
    r"yelled|snapped|warned|declared|laughed|smiled|frowned|shrugged|shook|announced|insisted|responded)"
)
_SPEECH = re.compile(rf"\"[^\"]{{1,500}}[,.!?-]\"(?=\s+(?:\w+\s+){{0,3}}{_SAYS}\b)")
_SAID = re.compile(rf"(\b{_SAYS}[,:])\s*\"[^\"]{{1,500}}\"")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_WHOLE = {
    "can't": ("cannot",), "cant": ("cannot",), "won't": ("will", "not"), "shan't": ("shall", "not"),
    "let's": ("let", "us"), "it's": ("it", "is"), "that's": ("that", "is"), "there's": ("there", "is"),
    "here's": ("here", "is"), "what's": ("what", "is"), "who's": ("who", "is"), "he's": ("he", "is"),
    "she's": ("she", "is"), "dont": ("do", "not"), "im": ("i", "am"), "ain't": ("am", "not"),
}  # fmt: skip
_ENDINGS = {"'m": "am", "'re": "are", "'ve": "have", "'ll": "will", "'d": "would"}
MAX_CHARACTERS = 6000


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence: its words in lower case, contractions spelt out. `item`: it is an item of a list."""

    words: tuple[str, ...]
    item: bool = False

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True, slots=True)
class Voice:
    """What one voice of a reply says; `name` is how the reply calls it, empty for its own."""

    name: str
    sentences: tuple[Sentence, ...]

    @property
    def n_words(self) -> int:
        return sum(len(sentence.words) for sentence in self.sentences)


def plain(text: str) -> str:
    """Text without typography: straight quotes, no emphasis, no headings; lines and items of lists are kept."""
    if text.isascii():
        straight = text.replace("`", "'").replace("\t", " ").replace("\r", "\n")
    else:
        straight = text.translate(_TYPOGRAPHY)
    return _EMPHASIS.sub("", _LEADING.sub("", straight)).strip()


def words_of(text: str) -> tuple[str, ...]:
    """Words in lower case, contractions spelt out ("can't", "can not" -> "cannot"; "don't" -> "do", "not")."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if "'" not in word and word not in _WHOLE:
            if word == "not" and found and found[-1] == "can":
                found[-1] = "cannot"
            else:
                found.append(word)
            continue
        found.extend(_spelt_out(word))
    return tuple(found)


def _spelt_out(word: str) -> tuple[str, ...]:
    if word in _WHOLE:
        return _WHOLE[word]
    if word.endswith("n't"):
        return (word[:-3], "not")
    stem, mark, ending = word.rpartition("'")
    return (stem, _ENDINGS[mark + ending]) if mark + ending in _ENDINGS else (word,)


def without_speech(text: str) -> str:
    """Plain text without what others are quoted as saying."""
    if '"' not in text:
        return text
    return _SAID.sub(r"\1 ", _SPEECH.sub(" ", text)).strip()


def spoken(text: str) -> list[str]:
    """What each voice of a plain text says, in order; the text alone where it has one voice."""
    return [said for _, said in _parted(text) if said.strip()] or [text]


def _parted(text: str) -> Iterator[tuple[str, str]]:
    """(name, what it says) for each voice, the first without a name."""
    marks = list(_VOICE.finditer(text))
    yield "", text[: marks[0].start()] if marks else text
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=False):
        yield _name(mark), text[mark.end() : end]


def voices_of(reply: str, prompt: str = "") -> tuple[Voice, ...]:
    """The voices of a reply in order; those that say nothing are left out."""
    return voices_in(without_speech(without_prompt(plain(reply[:MAX_CHARACTERS]), plain(prompt))))


def voices_in(text: str) -> tuple[Voice, ...]:
    """As `voices_of`, of a text that is plain already."""
    voices = (Voice(name, _sentences(said)) for name, said in _parted(text))
    return tuple(voice for voice in voices if voice.sentences)


def _name(mark: re.Match[str]) -> str:
    return next((group for group in mark.groups() if group), "").strip().lower()


def without_prompt(text: str, prompt: str) -> str:
    """The text after a repetition of the prompt at its beginning, in quotation marks or not, after a name or not."""
    if len(prompt) < 12:
        return text
    head = text[: len(prompt) + 60].lower()
    start = head.find(prompt.lower().strip("\"' "))
    if start < 0 or start > 40:
        return text
    rest = text[start + len(prompt.strip("\"' ")) :].lstrip("\"'?!. \n")
    return rest or text


def _sentences(text: str) -> tuple[Sentence, ...]:
    marked = _ITEM.sub("\n\x00", text)
    found = []
    for part in _ENDS.split(marked):
        if part and (words := words_of(part)):
            found.append(Sentence(words, part.lstrip().startswith("\x00")))
    return tuple(found)


def flat(voices: Sequence[Voice]) -> tuple[Sentence, ...]:
    """All sentences of all voices, in order."""
    return tuple(sentence for voice in voices for sentence in voice.sentences)
