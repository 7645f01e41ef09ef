"""The formats, one row each: what a format has words for, how it is written, and how it is read. A new one is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clampdown.errors import ExportError, SteeringFileError
from clampdown.interop.exports import baked, easysteer, harness, neuronpedia, vectors
from clampdown.interop.exports.forms import Bound, Words
from clampdown.interop.exports.wanted import Wanted, plan_of_vectors
from clampdown.steering.plan import Plan


@dataclass(frozen=True, slots=True)
class Format:
    """One format. `suffix` ends the name of a file that is written (a `directory` has none, and must be new); `reads`
    says whether a file or an address is of it, and `model` which model an address is about."""

    name: str
    of: str
    words: Words
    suffix: str
    write: Callable[[Bound, Path], None]
    read: Callable[[Wanted], Plan] | None = None
    reads: Callable[[str], bool] = lambda _source: False
    model: Callable[[str], str | None] = lambda _source: None
    directory: bool = False


def _ends(*suffixes: str) -> Callable[[str], bool]:
    return lambda source: source.lower().endswith(suffixes)


def _of_vectors(read: Callable[[Path], vectors.Directions]) -> Callable[[Wanted], Plan]:
    return lambda wanted: plan_of_vectors(wanted, read(wanted.path))


_ROWS = (
    Format(
        "gguf",
        "control vector of llama.cpp and repeng",
        vectors.CONTROL_VECTOR,
        ".gguf",
        vectors.write_control_vector,
        _of_vectors(vectors.read_control_vector),
        _ends(".gguf"),
    ),
    Format(
        "svec",
        "behaviour vector of CAST (activation-steering)",
        vectors.SVEC,
        ".svec",
        vectors.write_svec,
        _of_vectors(vectors.read_svec),
        _ends(".svec"),
    ),
    Format(
        "lm-eval",
        "steering file (.pt) of lm-evaluation-harness's model `steered`",
        harness.STEERED,
        ".pt",
        harness.write_steered,
        harness.read_steered,
        _ends(".pt", ".pth"),
    ),
    Format(
        "lm-eval-csv",
        "SAE features (CSV) for lm-evaluation-harness's model `steered`",
        harness.FEATURE_ROWS,
        ".csv",
        harness.write_feature_rows,
        harness.read_feature_rows,
        _ends(".csv"),
    ),
    Format(
        "checkpoint",
        "a checkpoint with the plan in its weights, for transformers and all that loads its files",
        baked.CHECKPOINT,
        "",
        baked.write_checkpoint,
        directory=True,
    ),
    Format(
        "easysteer",
        "steering specification of EasySteer (vLLM)",
        easysteer.SPECIFICATION,
        ".json",
        easysteer.write_specification,
        easysteer.read_specification,
        _ends(".json"),
    ),
    Format(
        "neuronpedia",
        "features and their pages for Neuronpedia's steering; read: the address of a feature's page",
        neuronpedia.FEATURES,
        ".neuronpedia.json",
        neuronpedia.write_features,
        neuronpedia.read_page,
        neuronpedia.is_page,
        neuronpedia.model_of_page,
    ),
)

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}


def format_named(name: str) -> Format:
    """The row of a format. Raises `ExportError`."""
    if name not in FORMATS:
        raise ExportError(f"no format is called '{name}'", hint=f"one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def format_of(source: str) -> Format:
    """The format that a file or an address is of, by its name. Raises `SteeringFileError`."""
    for row in FORMATS.values():
        if row.read is not None and row.reads(source):
            return row
    known = ", ".join(f"{row.name} ({row.of})" for row in FORMATS.values() if row.read)
    raise SteeringFileError(f"'{source[:200]}' is of no format that is read here", hint=f"known: {known}")
