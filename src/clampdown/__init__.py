"""clampdown: find the features that make a language model refuse, steer them, and see what it costs.

    import clampdown as cd

The names of `clampdown.face` are here, each imported when it is first used: importing the package alone loads neither
torch nor transformers, so that `clampdown --help` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clampdown.face import (
        Budgets,
        Placing,
        add,
        along,
        attack,
        card,
        clamp,
        data,
        evaluate,
        evaluate_shard,
        export,
        find,
        gate,
        generate,
        import_plan,
        load,
        load_sae,
        merge,
        plan,
        run,
        run_study,
        side_effects,
        steer,
        tune,
    )

__all__ = [
    "Budgets",
    "Placing",
    "add",
    "along",
    "attack",
    "card",
    "clamp",
    "data",
    "evaluate",
    "evaluate_shard",
    "export",
    "find",
    "gate",
    "generate",
    "import_plan",
    "load",
    "load_sae",
    "merge",
    "plan",
    "run",
    "run_study",
    "side_effects",
    "steer",
    "tune",
]

_FACE = frozenset(__all__)


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(import_module("clampdown.face"), name)
    raise AttributeError(f"module 'clampdown' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
