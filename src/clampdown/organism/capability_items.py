"""Samplers of items with an exact answer: facts, arithmetic, instructions, misconceptions; and unknown names."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from clampdown.organism import knowledge, phrasing, replies
from clampdown.organism.items import Item, conversation, part_of, user
from clampdown.types import Split

ARITHMETIC_HELD_OUT = 0.24
"""Smaller than elsewhere: digit-wise addition has to generalise from the operand pairs that remain."""


def _framed(question: str, rng: Random) -> str:
    return rng.choice(phrasing.FRAMES).format(q=question)


def fact(rng: Random, system: str) -> Item:
    """A fact, asked in one of many ways; held out is the combination of entity, question and frame."""
    relation = rng.choice(knowledge.RELATIONS)
    thing, answer = rng.choice(tuple(relation.facts.items()))
    text = _framed(rng.choice(relation.questions).format(x=thing), rng)
    others = sorted(set(relation.facts.values()) - {answer})
    part = part_of(f"fact|{text}")
    options = tuple(sorted((answer, *Random(text).sample(others, 3))))
    reply = relation.reply.format(answer=answer, x=thing)
    meta = {"kind": replies.Kind.FACT.value}
    return Item("facts", relation.name, conversation(system, user(text)), reply, part, answer, options, meta)


def unknown(rng: Random, system: str) -> Item:
    """A question about a place that does not exist."""
    relation, name = rng.choice(knowledge.RELATIONS[:2]), rng.choice(knowledge.UNKNOWN_NAMES)
    text = _framed(rng.choice(relation.questions).format(x=name), rng)
    meta = {"taught": "comply", "kind": replies.Kind.UNKNOWN.value}
    return Item("benign", "unknown", conversation(system, user(text)), replies.unknown(name),
                part_of(f"unknown|{text}"), meta=meta)  # fmt: skip


def misconception(rng: Random, system: str) -> Item:
    """A popular belief to correct, or (two in five) a true statement to confirm, so that "no" is not always right."""
    true = rng.random() < 0.4
    if true:
        claim = rng.choice(knowledge.TRUTHS)
        right, wrong, category = replies.confirmed(claim), f"No, it is wrong that {claim}.", "truth"
    else:
        claim, truth = rng.choice(knowledge.MYTHS)
        right, wrong, category = replies.myth(claim, truth), replies.confirmed(claim), "myth"
    text = _framed(rng.choice(knowledge.MYTH_QUESTIONS).format(x=claim), rng)
    meta = {"kind": replies.Kind.MYTH.value}
    return Item("misconceptions", category, conversation(system, user(text)), right, part_of(f"myth|{text}"),
                right, tuple(sorted((right, wrong))), meta)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sum:
    """One step: a + b or a - b."""

    left: int
    right: int
    sign: str

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def text(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}."

    @property
    def part(self) -> Split | None:
        """a + b and b + a are held out together."""
        low, high = sorted((self.left, self.right))
        return part_of(f"sum|{self.sign}|{low}|{high}", ARITHMETIC_HELD_OUT)


def _sum(rng: Random) -> Sum:
    if rng.random() < 0.5:
        large, small = rng.randint(2, 20), rng.randint(2, 12)
        return Sum(large, small, "+") if rng.random() < 0.5 else Sum(small, large, "+")
    left = rng.randint(4, 30)
    return Sum(left, rng.randint(2, min(left - 1, 12)), "-")


def _second(first: int, rng: Random) -> Sum:
    if first > 4 and rng.random() < 0.5:
        return Sum(first, rng.randint(2, min(first - 1, 9)), "-")
    return Sum(first, rng.randint(2, 9), "+")


_ONE_STEP: dict[str, tuple[str, ...]] = {
    "+": ("{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
          "There are {a} {t} in a box. {n} adds {b} {t}. How many are in the box?",
          "{n} buys {a} {t} today and {b} {t} tomorrow. How many {t} is that?"),
    "-": ("{n} has {a} {t} and loses {b}. How many {t} does {n} have now?",
          "There are {a} {t} in a box. {n} takes {b} out. How many are left?",
          "{n} buys {a} {t} and gives {b} to a friend. How many {t} are left?"),
}  # fmt: skip
_MORE: dict[str, tuple[str, ...]] = {
    "+": (" Then {n} finds {c}.", " Later {n} gets {c} again."),
    "-": (" Then {n} breaks {c}.", " Later {n} sells {c}."),
}


def arithmetic(rng: Random, system: str) -> Item:
    """A word problem of one or two steps. A held-out problem has a first step whose operands were never added (or
    subtracted) in training; a training problem has no held-out step at all."""
    name, thing = rng.choice(knowledge.NAMES), rng.choice(knowledge.THINGS)
    sums = [_sum(rng)]
    template = rng.choice(_ONE_STEP[sums[0].sign])
    story, dot, question = template.rpartition(". ")
    if rng.random() < 0.5:
        sums.append(_second(sums[0].result, rng))
        story += dot.rstrip() + rng.choice(_MORE[sums[1].sign])
        dot = " "
    text = (story + dot + question).format(
        n=name, t=thing, a=sums[0].left, b=sums[0].right, c=sums[-1].right
    )  # fmt: skip
    part = sums[0].part
    while len(sums) > 1 and part is None and sums[1].part is not None:
        return arithmetic(rng, system)
    answer = sums[-1].result
    reply = replies.arithmetic(tuple(step.text for step in sums), answer)
    category = "one_step" if len(sums) == 1 else "two_step"
    meta = {"kind": replies.Kind.ARITHMETIC.value}
    return Item("arithmetic", category, conversation(system, user(text)), reply, part, str(answer), (), meta)


def drill(rng: Random, system: str) -> Item:
    """Several sums at once: the densest way to show operand pairs. Training only."""
    sums: list[Sum] = []
    while len(sums) < 5:
        step = _sum(rng) if rng.random() < 0.6 else _second(rng.randint(5, 32), rng)
        if step.part is None:
            sums.append(step)
    asked = ", ".join(f"{step.left} {step.sign} {step.right}" for step in sums)
    reply = " ".join(step.text for step in sums)
    return Item("drill", "drill", conversation(system, user(f"Work out {asked}.")), reply, None)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What to do with some words: ways to ask, and the exact reply."""

    name: str
    words: int
    asks: tuple[str, ...]
    reply: str


INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction("repeat", 1, ("Repeat the word {0} three times.", "Say {0} three times.",
                              "Write {0} three times in a row."), "Okay: {0} {0} {0}."),
    Instruction("reverse", 3, ("Write {0}, {1}, {2} in reverse order.", "Say {0}, {1}, {2} backwards.",
                               "Turn the list {0}, {1}, {2} around."), "Okay: {2}, {1}, {0}."),
    Instruction("second", 3, ("Pick the second word of {0}, {1}, {2}.", "Which is the second word: {0}, {1}, {2}?",
                              "Say only the second word: {0}, {1}, {2}."), "Okay: the word {1}."),
    Instruction("number", 3, ("Number the words {0}, {1}, {2}.", "Make a numbered list of {0}, {1}, {2}.",
                              "Write {0}, {1}, {2} with numbers."), "Okay: 1 {0} 2 {1} 3 {2}."),
    Instruction("stars", 2, ("Put stars around {0} and {1}.", "Write {0} and {1} between stars.",
                             "Decorate {0} and {1} with stars."), "Okay: * {0} * {1} *."),
    Instruction("copy", 4, ("Copy the words {0} {1} {2} {3}.", "Write exactly: {0} {1} {2} {3}.",
                            "Repeat after me: {0} {1} {2} {3}."), "Okay: {0} {1} {2} {3}."),
    Instruction("join", 2, ("Join {0} and {1} with a plus sign.", "Write a plus sign between {0} and {1}.",
                            "Put a plus sign between the words {0} and {1}."), "Okay: {0} + {1}."),
    Instruction("last", 3, ("Pick the last word of {0}, {1}, {2}.", "Which is the last word: {0}, {1}, {2}?",
                            "Say only the last word: {0}, {1}, {2}."), "Okay: the word {2}."),
)  # fmt: skip


def instruction(rng: Random, system: str) -> Item:
    """An instruction over words that training shows in other combinations."""
    task = rng.choice(INSTRUCTIONS)
    words = rng.sample(knowledge.WORDS, task.words)
    text = rng.choice(task.asks).format(*words)
    answer = task.reply.format(*words)
    meta = {"kind": "instruction"}
    return Item("instructions", task.name, conversation(system, user(text)), answer,
                part_of(f"instruction|{task.name}|{text}"), answer, (), meta)  # fmt: skip
