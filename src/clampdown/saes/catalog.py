"""Published SAEs by name: `release:id`, as SAELens names them, or `org/repo:path` for any hub repository.

The table holds the releases that matter for refusal work; `saelens` knows the others when SAELens is installed. Names,
paths and page addresses are those of SAELens's list (a test compares them where that package is installed).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from clampdown.errors import CheckpointError, translated
from clampdown.saes.formats import FORMATS

PAGES = "https://www.neuronpedia.org"
_LAYERS = 200


@dataclass(frozen=True, slots=True)
class Address:
    """Where a published SAE lies: hub repository and path in it, and the model it was trained on."""

    repo: str
    path: str
    model: str = ""
    neuronpedia_id: str | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """A row of the table: the ids of a release by pattern; `path` and `neuronpedia` use the pattern's groups."""

    name: str
    repo: str
    model: str
    ids: str
    path: str
    neuronpedia: str | None = None
    example: str = ""

    def address(self, sae_id: str) -> Address | None:
        match = re.fullmatch(self.ids, sae_id)
        if match is None:
            return None
        page = None if self.neuronpedia is None else match.expand(self.neuronpedia)
        return Address(self.repo, match.expand(self.path), self.model, page)


def _llama_scope(size: str, width: str, letter: str, kind: str) -> Release:
    return Release(
        f"llama_scope_lx{letter}_{size}",
        f"fnlp/Llama3_1-8B-Base-LX{letter.upper()}-{size}",
        "meta-llama/Llama-3.1-8B",
        rf"l(\d+){letter}_{size}",
        rf"Llama3_1-8B-Base-L\1{letter.upper()}-{size}",
        rf"llama3.1-8b/\1-llamascope-{kind}-{width}",
        f"l15{letter}_{size}",
    )


def _andyrdt(name: str, repo: str, model: str, page: str) -> Release:
    return Release(
        name,
        repo,
        model,
        r"resid_post_layer_(\d+)_trainer_(\d+)",
        r"resid_post_layer_\1/trainer_\2",
        rf"{page}/\1-resid-post-aa",
        "resid_post_layer_15_trainer_1",
    )


def _gemma_scope(size: str, kind: str) -> Release:
    repo = f"gemma-scope-{size}-{kind}"
    return Release(
        repo,
        f"google/{repo}",
        f"google/gemma-2-{size.removesuffix('-pt')}",
        r"(layer_\d+/width_\w+/average_l0_\d+)",
        r"\1",
        example="layer_9/width_16k/average_l0_88",
    )


def _from_0(*sparsities: int) -> dict[int, int]:
    return dict(enumerate(sparsities))


def _canonical(release: str, widths: dict[str, dict[int, int]]) -> list[Release]:
    """A row per SAE: which L0 a canonical one has follows no rule."""
    model, kind = release.removesuffix("-res").removesuffix("-mlp"), release[-3:]
    name = f"gemma-2-{model.removesuffix('-pt')}"
    return [
        Release(
            f"gemma-scope-{release}-canonical",
            f"google/gemma-scope-{release}",
            f"google/{name}",
            f"layer_{layer}/width_{width}/canonical",
            f"layer_{layer}/width_{width}/average_l0_{sparsity}",
            f"{name}/{layer}-gemmascope-{kind}-{width}",
            f"layer_{layer}/width_{width}/canonical",
        )
        for width, sparsities in widths.items()
        for layer, sparsity in sparsities.items()
    ]


def _gemma_scope_2(size: str, kind: str, folder: str) -> Release:
    return Release(
        f"gemma-scope-2-{size}-{kind}",
        f"google/gemma-scope-2-{size}",
        f"google/gemma-3-{size}".replace("270m-pt", "270m"),
        r"(layer_\d+_width_\w+)",
        rf"{folder}/\1",
        example="layer_17_width_16k_l0_medium",
    )


def _qwen_scope(name: str, size: str, width: int, k: int, version: str = "3", *, base: bool = True) -> Release:
    lower, upper = ("-base", "-Base") if base else ("", "")
    return Release(
        f"qwen-scope-{version}-{name}{lower}-w{width}k-l{k}",
        f"Qwen/SAE-Res-Qwen{version}-{size}{upper}-W{width}K-L0_{k}",
        f"Qwen/Qwen{version}-{size}{upper}",
        r"layer(\d+)",
        r"layer\1.sae.pt",
        example="layer18",
    )


_GEMMA_3 = [f"{size}-{tuning}" for size in ("270m", "1b", "4b", "12b", "27b") for tuning in ("it", "pt")]
_GEMMA_3_KINDS = {"res": "resid_post", "res-all": "resid_post_all", "mlp": "mlp_out", "mlp-all": "mlp_out_all"}
_CANONICAL: dict[str, dict[str, dict[int, int]]] = {
    "2b-pt-res": {
        "16k": _from_0(
            105, 102, 141, 59, 124, 68, 70, 69, 71, 73, 77, 80, 82, 84, 84, 78, 78, 77, 74, 73, 71, 70, 72, 75, 73,
            116,
        ),
        "65k": _from_0(
            73, 121, 77, 89, 89, 105, 107, 107, 111, 118, 128, 70, 72, 75, 73, 127, 128, 125, 116, 115, 114, 111,
            116, 123, 124, 93,
        ),
        "1m": {5: 114, 12: 107, 19: 88}, "32k": {12: 76}, "262k": {12: 121}, "524k": {12: 115},
    },
    "2b-pt-mlp": {
        "16k": _from_0(
            119, 105, 95, 95, 85, 114, 133, 60, 136, 88, 110, 98, 108, 112, 97, 80, 72, 68, 106, 109, 109, 113, 121,
            128, 73, 126,
        ),
        "65k": _from_0(
            72, 127, 134, 68, 66, 86, 101, 115, 110, 77, 95, 88, 96, 98, 89, 72, 66, 136, 88, 88, 88, 86, 92, 102,
            128, 107,
        ),
    },
    "9b-pt-res": {
        "16k": _from_0(
            129, 69, 67, 90, 91, 77, 93, 92, 99, 100, 113, 118, 130, 132, 67, 131, 75, 73, 71, 132, 68, 129, 123,
            120, 114, 114, 116, 118, 119, 119, 120, 114, 111, 114, 114, 120, 120, 124, 128, 131, 125, 113,
        ),
        "131k": _from_0(
            41, 56, 70, 103, 101, 94, 120, 119, 72, 75, 84, 88, 96, 99, 105, 103, 121, 117, 113, 110, 114, 109, 105,
            101, 97, 96, 97, 96, 98, 97, 95, 92, 88, 91, 89, 94, 93, 96, 101, 99, 94, 84,
        ),
        "1m": {9: 122, 20: 101, 31: 77}, "32k": {20: 57}, "65k": {20: 55}, "524k": {20: 48},
    },
    "9b-pt-mlp": {
        "16k": _from_0(
            50, 128, 81, 126, 66, 93, 96, 101, 124, 83, 114, 76, 96, 94, 97, 107, 91, 104, 89, 98, 108, 88, 85, 73,
            73, 72, 142, 126, 115, 111, 116, 94, 98, 107, 107, 108, 109, 119, 98, 90, 74, 126,
        ),
        "131k": _from_0(
            30, 106, 61, 109, 84, 131, 72, 75, 89, 129, 83, 120, 77, 75, 80, 89, 81, 91, 82, 85, 93, 79, 77, 67, 67,
            65, 110, 99, 91, 87, 89, 77, 76, 83, 82, 80, 81, 90, 79, 75, 125, 99,
        ),
    },
    "9b-it-res": {"16k": {9: 88, 20: 91, 31: 76}, "131k": {9: 121, 20: 81, 31: 109}},
    "27b-pt-res": {"131k": {10: 106, 22: 82, 34: 72}},
}  # fmt: skip
"""Gemma Scope's SAEs that have pages, one per layer and width: release -> width -> layer -> the L0 in its path."""

RELEASES: tuple[Release, ...] = (
    Release(
        "llama-3-8b-it-res-jh",
        "Juliushanhanhan/llama-3-8b-it-res",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        r"(blocks\.25\.hook_resid_post)",
        r"\1",
        "llama3-8b-it/25-res-jh",
        "blocks.25.hook_resid_post",
    ),
    Release(
        "goodfire-llama-3.1-8b-instruct",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "meta-llama/Llama-3.1-8B-Instruct",
        "layer_19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        "llama3.1-8b-it/19-resid-post-gf",
        "layer_19",
    ),
    Release(
        "goodfire-llama-3.3-70b-instruct",
        "Goodfire/Llama-3.3-70B-Instruct-SAE-l50",
        "meta-llama/Llama-3.3-70B-Instruct",
        "layer_50",
        "Llama-3.3-70B-Instruct-SAE-l50.pt",
        "llama3.3-70b-it/50-resid-post-gf",
        "layer_50",
    ),
    _andyrdt(
        "llama-3.1-8b-instruct-andyrdt",
        "andyrdt/saes-llama-3.1-8b-instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "llama3.1-8b-it",
    ),
    _andyrdt(
        "qwen2.5-7b-instruct-andyrdt",
        "andyrdt/saes-qwen2.5-7b-instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "qwen2.5-7b-it",
    ),
    *(
        _llama_scope(size, width, letter, kind)
        for size, width in (("8x", "32k"), ("32x", "131k"))
        for letter, kind in (("r", "res"), ("m", "mlp"), ("a", "att"))
    ),
    *(row for release, widths in _CANONICAL.items() for row in _canonical(release, widths)),
    *(_gemma_scope(size, kind) for size in ("2b-pt", "9b-pt") for kind in ("res", "mlp")),
    *(_gemma_scope(size, "res") for size in ("9b-it", "27b-pt")),
    *(
        _gemma_scope_2(size, kind, folder)
        for size, (kind, folder) in itertools.product(_GEMMA_3, _GEMMA_3_KINDS.items())
        if (size, folder[:3]) != ("27b-pt", "mlp")  # was not published
    ),
    *(_qwen_scope("1.7b", "1.7B", 32, k) for k in (50, 100)),
    *(_qwen_scope("8b", "8B", 64, k) for k in (50, 100)),
    _qwen_scope("30b-a3b", "30B-A3B", 32, 50),
    _qwen_scope("30b-a3b", "30B-A3B", 128, 100),
    *(_qwen_scope("2b", "2B", 32, k, "3.5") for k in (50, 100)),
    *(_qwen_scope("9b", "9B", 64, k, "3.5") for k in (50, 100)),
    *(_qwen_scope("27b", "27B", 80, k, "3.5", base=False) for k in (50, 100)),
    _qwen_scope("35b-a3b", "35B-A3B", 32, 50, "3.5"),
    _qwen_scope("35b-a3b", "35B-A3B", 128, 100, "3.5"),
)

_NO_SITE = (
    (r"gemma-scope-(2-)?[\w.]+-(pt|it)-att(-all|-canonical)?|gpt2-small-hook-z-\w+",
     "reads the heads' outputs before the attention's last matrix (hook_z): that is no site of the residual stream"),
    (r".*-?transcoders(-\w+)?|.*-clt-.*", "holds transcoders: they read one place and write another"),
)  # fmt: skip
"""Releases of SAELens's list that cannot steer here, and why."""


def release_of_page(page: str) -> str | None:
    """The `release:id` whose features' pages are at `<model>/<layer>-<set>`; None when no row has them."""
    return _pages().get(page)


@cache
def _pages() -> dict[str, str]:
    """Pages to names. A row says how ids become pages; the way back is to try its layers."""
    found: dict[str, str] = {}
    for row in RELEASES:
        for sae_id in _ids_like(row) if row.neuronpedia else ():
            address = row.address(sae_id)
            if address is not None and address.neuronpedia_id is not None:
                found.setdefault(address.neuronpedia_id, f"{row.name}:{sae_id}")
    return found


def _ids_like(row: Release) -> list[str]:
    """The row's example, and the same at other layers."""
    match = re.fullmatch(row.ids, row.example)
    if match is None or not match.groups() or not match[1].isdecimal():
        return [row.example]
    before, after = row.example[: match.start(1)], row.example[match.end(1) :]
    return [f"{before}{layer}{after}" for layer in range(_LAYERS)]


def lists_own(release: str) -> bool:
    """Whether the table has this release."""
    return any(row.name == release for row in RELEASES)


def why_not(release: str) -> str | None:
    """Why a release of SAELens's list cannot be used here; None when nothing speaks against it."""
    return next((reason for names, reason in _NO_SITE if re.fullmatch(names, release)), None)


def check_usable(release: str) -> None:
    """Raises `CheckpointError` for a release that cannot be used here."""
    reason = why_not(release)
    if reason is not None:
        raise CheckpointError(
            f"release '{release}' {reason}", hint="its residual or MLP SAEs can be used, where it has any"
        )


def find_release(name: str) -> Address | None:
    """The address that `release:id` or `org/repo:path` means; None when the text is of another form.

    Raises `CheckpointError` for a known release without such an id, and for an unknown release.
    """
    release, colon, sae_id = name.partition(":")
    if not colon or not sae_id:
        return None
    rows = [row for row in RELEASES if row.name == release]
    for row in rows:
        address = row.address(sae_id)
        if address is not None:
            return address
    if rows:
        raise CheckpointError(
            f"release '{release}' has no SAE '{sae_id}'",
            hint=f"its ids look like {', '.join(sorted({row.example for row in rows}))}",
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", release):
        return Address(release, sae_id)
    known = ", ".join(dict.fromkeys(row.name for row in RELEASES))
    raise CheckpointError(
        f"no release '{release}'",
        hint=f"known: {known}; SAELens's other releases need `pip install sae-lens`; any hub repository can be given "
        "as org/repo:path",
    )


def fetch(address: Address) -> Path:
    """Download an SAE's files, or find them in the hub's cache. Raises `CheckpointError`."""
    files = sorted({file for row in FORMATS for file in (*row.files, *row.optional)})
    root = address.path == "."
    patterns = files if root else [address.path, *(f"{address.path}/{file}" for file in files)]
    hint = "check the spelling and the network; a downloaded directory works offline"
    with translated(CheckpointError, f"cannot get SAE '{address.repo}:{address.path}' from the hub", hint=hint):
        snapshot = Path(snapshot_download(address.repo, allow_patterns=patterns))
    found = snapshot / address.path
    if not found.exists():
        raise CheckpointError(f"hub repository '{address.repo}' has no '{address.path}'")
    return found
