"""Published SAEs by name: `release:id`, as SAELens names them, or `org/repo:path` for any hub repository.

The table holds the releases that matter for refusal work; `saelens` knows the others when SAELens is installed. Names,
paths and page addresses are those of SAELens's list (a test compares them where that package is installed).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from clampdown.errors import CheckpointError, translated
from clampdown.saes.formats import FORMATS


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


def _llama_scope(size: str, width: str) -> Release:
    return Release(
        f"llama_scope_lxr_{size}",
        f"fnlp/Llama3_1-8B-Base-LXR-{size}",
        "meta-llama/Llama-3.1-8B",
        rf"l(\d+)r_{size}",
        rf"Llama3_1-8B-Base-L\1R-{size}",
        rf"llama3.1-8b/\1-llamascope-res-{width}",
        f"l15r_{size}",
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


def _gemma_scope_2(size: str, kind: str, folder: str) -> Release:
    return Release(
        f"gemma-scope-2-{size}-{kind}",
        f"google/gemma-scope-2-{size}",
        f"google/gemma-3-{size}".replace("270m-pt", "270m"),
        r"(layer_\d+_width_\w+)",
        rf"{folder}/\1",
        example="layer_17_width_16k_l0_medium",
    )


def _qwen_scope(name: str, base: str, width: int, k: int) -> Release:
    return Release(
        f"qwen-scope-3-{name}-base-w{width}k-l{k}",
        f"Qwen/SAE-Res-Qwen3-{base}-Base-W{width}K-L0_{k}",
        f"Qwen/Qwen3-{base}-Base",
        r"layer(\d+)",
        r"layer\1.sae.pt",
        example="layer18",
    )


_GEMMA_3 = [f"{size}-{tuning}" for size in ("270m", "1b", "4b", "12b", "27b") for tuning in ("it", "pt")]
_GEMMA_3_KINDS = {"res": "resid_post", "res-all": "resid_post_all", "mlp": "mlp_out", "mlp-all": "mlp_out_all"}
_GEMMA_2_CANONICAL = {("9", "16k"): 88, ("20", "16k"): 91, ("31", "16k"): 76}
_GEMMA_2_CANONICAL |= {("9", "131k"): 121, ("20", "131k"): 81, ("31", "131k"): 109}

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
    _llama_scope("8x", "32k"),
    _llama_scope("32x", "131k"),
    *(
        Release(
            "gemma-scope-9b-it-res-canonical",
            "google/gemma-scope-9b-it-res",
            "google/gemma-2-9b-it",
            f"layer_{layer}/width_{width}/canonical",
            f"layer_{layer}/width_{width}/average_l0_{sparsity}",
            f"gemma-2-9b-it/{layer}-gemmascope-res-{width}",
            f"layer_{layer}/width_{width}/canonical",
        )
        for (layer, width), sparsity in _GEMMA_2_CANONICAL.items()
    ),
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
)


def lists_own(release: str) -> bool:
    """Whether the table has this release."""
    return any(row.name == release for row in RELEASES)


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
    files = {file for row in FORMATS for file in (*row.files, *row.optional)}
    patterns = [address.path, *(f"{address.path}/{file}" for file in sorted(files))]
    hint = "check the spelling and the network; a downloaded directory works offline"
    with translated(CheckpointError, f"cannot get SAE '{address.repo}:{address.path}' from the hub", hint=hint):
        snapshot = Path(snapshot_download(address.repo, allow_patterns=patterns))
    found = snapshot / address.path
    if not found.exists():
        raise CheckpointError(f"hub repository '{address.repo}' has no '{address.path}'")
    return found
