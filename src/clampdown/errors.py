"""One tree of errors for everything that a user, a file or a model can get wrong.

Every error says what was wrong, where, and what to do next (`hint`). The command line turns any
`ClampdownError` into one readable message and exit code 2; a traceback is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ClampdownError(Exception):
    """Base of the tree. `hint` is the next thing to try, shown on a line of its own."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


def reason_of(error: BaseException) -> str:
    """A library's own words in one line, or the name of its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def translated(kind: type[ClampdownError], what: str, *, hint: str | None = None) -> Iterator[None]:
    """Around a library's loader: whatever it raises is one error of ours, with the library's as its cause.

    The one place that knows what passes: errors of ours, running out of memory, and what is no `Exception` (an
    interrupt). A list of a library's exceptions would be out of date with its next version.
    """
    try:
        yield
    except (ClampdownError, MemoryError):
        raise
    except Exception as cause:
        raise kind(f"{what}: {reason_of(cause)}", hint=hint) from cause


class ModelError(ClampdownError):
    """A model could not be loaded, or is not of a kind we can steer."""


class UnknownArchitectureError(ModelError):
    """No row of the layout table says where this model's decoder blocks are."""


class ChatTemplateError(ModelError):
    """The tokenizer has no chat template, or the template cannot express the conversation."""


class SaeError(ClampdownError):
    """A sparse autoencoder could not be loaded or used."""


class CheckpointError(SaeError):
    """A file of weights is missing, malformed or incomplete."""


class PickleCheckpointError(CheckpointError):
    """The only weights on offer would have to be unpickled, which executes code."""


class WidthMismatchError(SaeError):
    """The SAE's input width is not the model's residual width."""


class SaeFitWarning(UserWarning):
    """An SAE that fits the model's shape and may not be the model's: of another model, or a poor reconstruction."""


class SiteError(ClampdownError):
    """A hook point that does not exist in this model, or that cannot be parsed."""


class PlanError(ClampdownError):
    """A steering plan is malformed: unknown keys, wrong version, contradictory fields."""


class FeatureIndexError(PlanError):
    """A feature index outside the SAE."""


class StrengthError(PlanError):
    """A strength that is not a finite number."""


class PlanMismatchError(PlanError):
    """A plan made for another model or another SAE."""


class ScopeError(PlanError):
    """A plan whose scope cannot act in the requested mode."""


class ExportError(PlanError):
    """What a plan does cannot be said in another tool's format; says what, and why."""


class SteeringFileError(PlanError):
    """A steering file or an address of another tool that cannot be read as a plan."""


class SteeringNotAppliedError(ClampdownError):
    """Steering was asked for and did not happen. Never an unsteered answer under a steered label."""


class PromptSetError(ClampdownError):
    """A prompt file is missing, malformed, empty or unlabelled; says which line."""


class JudgeError(ClampdownError):
    """A judge could not be reached or did not answer in its format."""


class JudgeUnreachableError(JudgeError):
    """The judge did not answer at all: replies stay unjudged and wait, and a rerun judges them."""


class EndpointError(ClampdownError):
    """An HTTP endpoint refused a request for good: wrong key, unknown model, malformed request."""


class EndpointDownError(EndpointError):
    """An HTTP endpoint did not answer, or not sensibly, after every retry. Later it may."""


class StoreError(ClampdownError):
    """A run directory cannot be read or written: wrong schema, another run's records, disk full."""


class FeatureSetError(StoreError):
    """A file of features is malformed, of another schema, or incomplete."""


class FeatureSetMismatchError(FeatureSetError):
    """Two sets of features, or a set and a model, that are not about the same SAE: their indices mean other things."""


class ShardError(StoreError):
    """A shard is missing, doubled, unfinished, or of another run; names it."""


class MissingPackageError(ClampdownError):
    """An optional package that this needs is not installed; the hint says how to get it."""


class RecipeError(ClampdownError):
    """A recipe is malformed, or names what does not exist; says which field."""


class NotEnoughDataError(ClampdownError):
    """A guarantee or estimate was asked for that this many observations cannot give; says how many would."""


class RequestError(ClampdownError):
    """A request to the server that cannot be answered as it stands: an empty prompt, an unknown plan, a wild edit.

    `status` is its HTTP status, `code` a word for programs, `param` the field that is wrong.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param


class QueueFullError(ClampdownError):
    """The engine takes no more requests now; `retry_after` is how many seconds to wait before trying again."""

    def __init__(self, message: str, *, retry_after: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after
