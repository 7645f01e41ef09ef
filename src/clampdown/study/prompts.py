"""A study's prompts, by role and split: of the embedded corpus, of files, of public sets.

| split | informs |
|---|---|
| discovery | features, their units, the fits of gates |
| calibration | thresholds of gates |
| validation | every choice: feature, strength, scope, method |
| test | nothing: it is read once |

Prompts whose file has no `split` are dealt by a hash of what they are after (`evaluation/dealing.py`). Suites of
held-out attack families are tested only: no fit, threshold or choice sees a prompt in their wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clampdown.config import ORGANISM
from clampdown.discovery.pairs import Pair
from clampdown.errors import PromptSetError
from clampdown.evaluation.catalog import is_named, load_suites, local_copy
from clampdown.evaluation.dealing import dealt, has_splits, place_of, split_of
from clampdown.evaluation.rows import READERS
from clampdown.evaluation.suites import FAMILY, TARGET, read_suites
from clampdown.study.composing import (
    Template,
    escalated,
    parted,
    pooled,
    read_templates,
    with_splits,
    wrapped,
    wrapped_benign,
)
from clampdown.study.wrapping import GENERAL_WRAPPERS, PLACE, Part, corpus_parts
from clampdown.types import ATTACKS, SAFE, Prompt, PromptRole, Split, Suite, SuiteKind

Source = str | Path
Sources = Source | Sequence[Source]

SEEN, UNSEEN = "seen", "unseen"
HELD_OUT_SHARE = 1 / 3
"""Share of the attack families of a file without splits that are tested only."""
NEEDED = {
    Split.DISCOVERY: "features are found on them",
    Split.VALIDATION: "features and strengths are chosen on them",
    Split.TEST: "what is reported is measured on them",
}
_Draw = Callable[[str, Split, int | None], Suite]


def _no_twin(_prompt: Prompt) -> Prompt | None:
    return None


@dataclass(frozen=True, slots=True)
class StudyPrompts:
    """Suites by role, drawn by split.

    `roles` maps suites, in the order of reports. `held_out` names suites of attack families that are only tested,
    `over_refused` those that steering down is for. `twin` gives the plain request of a wrapped one, where it is known.
    `parts` are what gates learn to read past: wrappers that are put around harmful and harmless requests alike.
    """

    name: str
    roles: Mapping[str, PromptRole]
    draw: _Draw = field(repr=False)
    held_out: frozenset[str] = frozenset()
    over_refused: frozenset[str] = frozenset()
    twin: Callable[[Prompt], Prompt | None] = field(default=_no_twin, repr=False)
    parts: tuple[Part, ...] = field(default=GENERAL_WRAPPERS, repr=False)

    def suites(self, split: Split, n: int | None, *roles: PromptRole) -> tuple[Suite, ...]:
        """At most `n` prompts of every suite of these roles (none named: of all), held-out families among them."""
        names = [name for name, role in self.roles.items() if not roles or role in roles]
        return tuple(self.draw(name, split, n) for name in names)

    def known(self, split: Split, n: int | None, *roles: PromptRole) -> tuple[Suite, ...]:
        """As `suites`, without those of held-out families and those without a prompt: what may inform a decision."""
        found = self.suites(split, n, *roles)
        return tuple(suite for suite in found if suite.prompts and suite.name not in self.held_out)

    def prompts(self, split: Split, n: int | None, *roles: PromptRole) -> list[Prompt]:
        """The prompts of `known`."""
        return [prompt for suite in self.known(split, n, *roles) for prompt in suite.prompts]

    def pairs(self, n: int | None) -> tuple[Pair, ...]:
        """Discovery requests beside their jailbroken forms, where it is known which belongs to which."""
        wrapped = self.prompts(Split.DISCOVERY, n, PromptRole.JAILBROKEN)
        twins = ((self.twin(prompt), prompt) for prompt in wrapped)
        return tuple(Pair(plain, prompt) for plain, prompt in twins if plain is not None)

    def count(self, split: Split, *roles: PromptRole) -> int:
        """How many prompts of these roles may inform a decision on the split."""
        return len(self.prompts(split, None, *roles))

    def only(self, names: Sequence[str]) -> StudyPrompts:
        """With just these suites. Raises `PromptSetError` for one that is not there."""
        unknown = [name for name in names if name not in self.roles]
        if unknown:
            raise PromptSetError(f"no suite called {', '.join(unknown)}", hint=f"one of: {', '.join(self.roles)}")
        return replace(self, roles={name: role for name, role in self.roles.items() if name in names})

    def at_most(self, limits: Mapping[str, int], *splits: Split) -> StudyPrompts:
        """With so many prompts of these suites at most on these splits (none named: on each). Raises `PromptSetError`
        for a suite that is not there."""
        self.only(tuple(limits))
        draw = self.draw

        def limited(name: str, split: Split, n: int | None) -> Suite:
            limit = limits.get(name) if not splits or split in splits else None
            return draw(name, split, n if limit is None else limit if n is None else min(n, limit))

        return replace(self, draw=limited)

    def roles_of(self, *roles: PromptRole) -> tuple[str, ...]:
        """The names of the suites of these roles."""
        return tuple(name for name, role in self.roles.items() if role in roles)

    def __str__(self) -> str:
        rows = [f"{name} ({role.value}{', tested only' if name in self.held_out else ''})" for name, role in
                self.roles.items()]  # fmt: skip
        return f"prompts of {self.name}: {', '.join(rows)}"


# ---- the embedded corpus -----------------------------------------------------------------------------------------

_EMBEDDED = {
    "harmful": PromptRole.HARMFUL,
    "jailbroken_seen": PromptRole.JAILBROKEN,
    "jailbroken_unseen": PromptRole.JAILBROKEN,
    "multi_turn": PromptRole.MULTI_TURN,
    "borderline": PromptRole.BORDERLINE,
    "about_harm": PromptRole.BORDERLINE,
    "benign": PromptRole.BENIGN,
    "facts": PromptRole.CAPABILITY,
    "arithmetic": PromptRole.CAPABILITY,
    "instructions": PromptRole.CAPABILITY,
    "misconceptions": PromptRole.CAPABILITY,
}


def embedded_prompts(seed: int = 0) -> StudyPrompts:
    """The embedded corpus: as many prompts as are asked for, other ones for another seed."""
    from clampdown.organism.suites import one_suite, without_wrapper

    return StudyPrompts(
        ORGANISM,
        _EMBEDDED,
        lambda name, split, n: one_suite(name, split, n, seed),
        held_out=frozenset({"jailbroken_unseen"}),
        over_refused=frozenset({"borderline"}),
        twin=without_wrapper,
        parts=corpus_parts(),
    )


# ---- files and public sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Composed:
    """What is made of the prompts that were given.

    `folder` holds local copies of public sets, in a folder for each under the name that its authors give the file;
    `pool` makes one suite of a role's sets; `templates` is a file of attack templates, into which the plain harmful
    requests are put (those of at most `longest` characters; the share `held_out` is filled with test requests only);
    `wrap_benign` puts short benign requests into the templates too; `escalate` asks the harmful ones at the end of
    scripted conversations.
    """

    folder: Path | None = None
    pool: bool = False
    templates: str | None = None
    longest: int | None = None
    held_out: float = HELD_OUT_SHARE
    escalate: bool = False
    wrap_benign: bool = False

    def found(self, source: Source) -> Source:
        """A set by its name as its local copy, where the folder has one."""
        if self.folder is None or _is_file(source) or not is_named(str(source)) or "=" in str(source):
            return source
        path = local_copy(str(source), self.folder)
        return source if path is None else f"{source}={path}"

    def of(self, loaded: Sequence[tuple[PromptRole, Suite]]) -> list[tuple[PromptRole, Suite]]:
        """The suites with what is made of them."""
        by_role: dict[PromptRole, list[Suite]] = {}
        for role, suite in loaded:
            by_role.setdefault(role, []).append(suite)
        if self.pool:
            by_role = {
                role: suites if role is PromptRole.CAPABILITY else [pooled(role, suites)]
                for role, suites in by_role.items()
            }
        requests = _each_once(by_role.get(PromptRole.HARMFUL, ()))
        if self.templates is not None:
            templates = self._read_templates()
            by_role.setdefault(PromptRole.JAILBROKEN, []).append(wrapped(requests, templates, self.held_out))
            benign = _each_once(by_role.get(PromptRole.BENIGN, ()))
            if self.wrap_benign and benign:
                by_role[PromptRole.BENIGN].append(wrapped_benign(benign, templates, self.held_out))
        if self.escalate:
            by_role.setdefault(PromptRole.MULTI_TURN, []).append(escalated(requests))
        return [(role, suite) for role, suites in by_role.items() for suite in suites]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is put around requests for gates: general sentences, and the templates that are not held out."""
        if self.templates is None:
            return GENERAL_WRAPPERS
        _, seen = parted(self._read_templates(), self.held_out)
        return (*GENERAL_WRAPPERS, *(Part(each.around(PLACE), each.name) for each in seen))

    def _read_templates(self) -> tuple[Template, ...]:
        return read_templates(self._templates(), self.longest)

    def _templates(self) -> Path:
        assert self.templates is not None
        local = self.folder / self.templates if self.folder else Path(self.templates)
        return local if local.exists() else Path(self.templates)


def prompts_from(
    *,
    harmful: Sources | None = None,
    jailbroken: Sources | None = None,
    multi_turn: Sources | None = None,
    borderline: Sources | None = None,
    benign: Sources | None = None,
    capability: Sources | None = None,
    mixed: Sources | None = None,
    name: str = "files",
    hold_out: Sequence[str] | None = None,
    composed: Composed | None = None,
) -> StudyPrompts:
    """Prompts of files (CSV, JSONL, JSON, Parquet, txt) or public sets (NAME or NAME=FILE) for each role.

    `mixed` are files of suites of several roles (columns `suite` and `harmful`), told apart by `role_of`. `hold_out`
    names the attack families (column `family`) that are tested only; by default a third of them, chosen by a hash of
    their names, or those that a file's own `split` column keeps to `test`. `composed` says what else is made of the
    prompts. Raises `PromptSetError` for what cannot be
    read, for a suite that two roles name, and when harmful or benign prompts are missing from a split.
    """
    given = {
        PromptRole.HARMFUL: harmful,
        PromptRole.JAILBROKEN: jailbroken,
        PromptRole.MULTI_TURN: multi_turn,
        PromptRole.BORDERLINE: borderline,
        PromptRole.BENIGN: benign,
        PromptRole.CAPABILITY: capability,
    }
    composed = composed or Composed()
    loaded = [
        (role, suite)
        for role, sources in given.items()
        for suite in _suites_of(role, [composed.found(source) for source in _listed(sources)])
    ]
    for source in _listed(mixed):
        every = read_suites(Path(source)) if _is_file(source) else load_suites(str(source))
        loaded += [(role, _as_role(role, suite, source)) for suite in every for role in [role_of(suite)]]
    found = replace(of_suites(composed.of(loaded), name, hold_out), parts=composed.parts)
    _check_needed(found)
    return found


def of_suites(
    loaded: Sequence[tuple[PromptRole, Suite]], name: str, hold_out: Sequence[str] | None = None
) -> StudyPrompts:
    """Prompts that are all at hand, each suite with its role; those without splits are dealt out."""
    _refuse_twice([suite.name for _, suite in loaded])
    asked = [p for role, suite in loaded if role is PromptRole.HARMFUL for p in suite.prompts]
    plain = {_key(p.text): p for p in asked} | {p.id: p for p in asked}
    roles: dict[str, PromptRole] = {}
    suites: dict[str, Suite] = {}
    held_out: set[str] = set()
    for role, suite in loaded:
        for part, tested_only in _by_family(role, _with_splits(suite, plain), hold_out):
            roles[part.name] = role
            suites[part.name] = part
            held_out |= {part.name} if tested_only else set()
    order = {role: place for place, role in enumerate(PromptRole)}

    def draw(wanted: str, split: Split, n: int | None) -> Suite:
        suite = suites[wanted]
        mine = tuple(prompt for prompt in suite.prompts if prompt.split is split)
        return replace(suite, prompts=mine if n is None else mine[:n])

    return StudyPrompts(
        name,
        dict(sorted(roles.items(), key=lambda item: order[item[1]])),
        draw,
        frozenset(held_out),
        frozenset(suite for suite, role in roles.items() if role is PromptRole.BORDERLINE),
        lambda prompt: _twin(prompt, plain),
    )


def role_of(suite: Suite) -> PromptRole:
    """What a suite's prompts are for, by its name where that begins with a role's, else by its label."""
    if suite.kind is SuiteKind.CAPABILITY:
        return PromptRole.CAPABILITY
    for role in (*ATTACKS, *SAFE):
        if suite.harmful == role.harmful and (suite.name == role.value or suite.name.startswith(f"{role.value}_")):
            return role
    return PromptRole.HARMFUL if suite.harmful else PromptRole.BORDERLINE


def _each_once(suites: Sequence[Suite]) -> list[Prompt]:
    """The prompts of several suites with the split that each has in its own, and ids that no two share."""
    return [
        prompt if len(suites) == 1 else replace(prompt, id=f"{suite.name}/{prompt.id}")
        for suite in suites
        for prompt in with_splits(suite.prompts)
    ]


def _listed(sources: Sources | None) -> list[Source]:
    if sources is None:
        return []
    return [sources] if isinstance(sources, str | Path) else list(sources)


def _suites_of(role: PromptRole, sources: Sequence[Source]) -> list[Suite]:
    found = [suite for source in sources for suite in _loaded(role, source)]
    if len(sources) == 1 and len(found) == 1 and _is_file(sources[0]):
        found = [_renamed(found[0], role.value)]
    return found


def _is_file(source: Source) -> bool:
    """Whether a source is a file of our own columns, and no public set: NAME, or NAME=FILE."""
    if isinstance(source, Path):
        return True
    return Path(source).suffix.lower() in READERS and not is_named(source)


def _loaded(role: PromptRole, source: Source) -> tuple[Suite, ...]:
    """The source's suites as suites of the role. A set with both labels gives the part that fits the role."""
    if _is_file(source):
        capability = role is PromptRole.CAPABILITY
        suites = read_suites(Path(source), harmful=None if capability else role.harmful)
        _check_labels(role, suites, source)
        return tuple(_as_role(role, suite, source) for suite in suites)
    suites = load_suites(str(source))
    fitting = tuple(s for s in suites if role is PromptRole.CAPABILITY or s.harmful == role.harmful)
    if not fitting:
        raise PromptSetError(
            f"'{source}' holds no prompts for the role {role.value}: in it refusing is "
            f"{'wrong' if role.harmful else 'right'}",
            hint="see `clampdown suites list`",
        )
    return tuple(_as_role(role, suite, source) for suite in fitting)


def _check_labels(role: PromptRole, suites: Sequence[Suite], source: Source) -> None:
    """A file's own labels may not say the opposite of the role that it was given."""
    for suite in suites:
        if role is not PromptRole.CAPABILITY and suite.kind is SuiteKind.SAFETY and suite.harmful != role.harmful:
            raise PromptSetError(
                f"{source}: suite '{suite.name}' is labelled {'harmful' if suite.harmful else 'harmless'}, and was "
                f"given as {role.value}",
                hint="give it under another role, or mend the column 'harmful'",
            )


def _as_role(role: PromptRole, suite: Suite, source: Source) -> Suite:
    if role is PromptRole.CAPABILITY:
        if suite.kind is not SuiteKind.CAPABILITY:
            raise PromptSetError(
                f"{source}: the prompts of '{suite.name}' have no right answer", hint="add a column 'answer'"
            )
        prompts = tuple(_scored(prompt) for prompt in suite.prompts)
        return Suite(suite.name, SuiteKind.CAPABILITY, False, prompts)
    plain = tuple(replace(prompt, answer=None, options=()) for prompt in suite.prompts)
    return Suite(suite.name, SuiteKind.SAFETY, role.harmful, plain)


def _scored(prompt: Prompt) -> Prompt:
    """An answer of a user's own file counts where the reply contains it; the row may say another way (`scoring`)."""
    if prompt.options or "scoring" in prompt.meta:
        return prompt
    return replace(prompt, meta={**prompt.meta, "scoring": "contains"})


def _renamed(suite: Suite, name: str) -> Suite:
    return replace(suite, name=name, prompts=tuple(replace(prompt, suite=name) for prompt in suite.prompts))


def _refuse_twice(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PromptSetError(f"two suites are called {', '.join(twice)}", hint="name each once, in one role")


def _with_splits(suite: Suite, plain: Mapping[str, Prompt]) -> Suite:
    """The suite with a split for every prompt. A wrapped request goes where its plain form goes."""
    if has_splits(suite.prompts):
        return suite
    twins = [_twin(prompt, plain) for prompt in suite.prompts]
    own = dealt(suite.prompts)
    prompts = (replace(p, split=split_of(twin.text)) if twin else p for p, twin in zip(own, twins, strict=True))
    return replace(suite, prompts=tuple(prompts))


def _twin(prompt: Prompt, plain: Mapping[str, Prompt]) -> Prompt | None:
    """The plain request of a wrapped one: the text that is its `target`, else the prompt of the same id."""
    return plain.get(_key(prompt.meta.get(TARGET, ""))) or plain.get(prompt.id)


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _by_family(role: PromptRole, suite: Suite, hold_out: Sequence[str] | None) -> list[tuple[Suite, bool]]:
    """The suite, or its seen and its held-out families as two suites; and whether each is tested only."""
    families = {prompt.meta[FAMILY] for prompt in suite.prompts if FAMILY in prompt.meta}
    if role not in ATTACKS:
        return [(suite, False)]
    apart = _held_out_families(suite, families, hold_out)
    if not apart:
        tested_only = all(prompt.split is Split.TEST for prompt in suite.prompts)
        return [(suite, tested_only)]
    unseen = tuple(_tested(p) for p in suite.prompts if p.meta.get(FAMILY) in apart)
    seen = tuple(p for p in suite.prompts if p.meta.get(FAMILY) not in apart)
    parts = [(replace(suite, prompts=seen), SEEN, False), (replace(suite, prompts=unseen), UNSEEN, True)]
    return [(_renamed(part, f"{suite.name}_{end}"), tested) for part, end, tested in parts if part.prompts]


def _tested(prompt: Prompt) -> Prompt:
    return replace(prompt, split=Split.TEST)


def _held_out_families(suite: Suite, families: set[str], hold_out: Sequence[str] | None) -> set[str]:
    if hold_out is not None:
        return families & set(hold_out)
    only_tested = {f for f in families if all(p.split is Split.TEST for p in suite.prompts if p.meta.get(FAMILY) == f)}
    if only_tested and only_tested != families:
        return only_tested
    ranked = sorted(families, key=_place)
    return set(ranked[: max(1, round(HELD_OUT_SHARE * len(ranked)))]) if len(ranked) > 1 else set()


def _place(family: str) -> tuple[int, str]:
    """An order of families that does not depend on which others there are."""
    return place_of(family), family


def _check_needed(found: StudyPrompts) -> None:
    """Raises `PromptSetError` unless harmful and harmless prompts are in every split that decides or is reported."""
    sides = {"harmful": ATTACKS, "benign": SAFE}
    for side, roles in sides.items():
        if not found.roles_of(*roles):
            raise PromptSetError(f"a study needs {side} prompts", hint=f"--{side} FILE or NAME")
        for split, why in NEEDED.items():
            if not found.count(split, *roles):
                total = sum(found.count(each, *roles) for each in Split)
                raise PromptSetError(
                    f"none of the {total} {side} prompts is of the {split.value} split: {why}",
                    hint="give at least 30 prompts of each side, or a column `split`",
                )
