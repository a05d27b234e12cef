"""Every error that misstep raises on purpose.

    MisstepError
    ├── InputError            the user's input is wrong             exit status 2
    │   ├── RecipeError       a recipe's key or value
    │   ├── PolicyError       a policy's key, blank or text
    │   ├── DataError         a data file, its line or its field
    │   │   ├── EmptyCell     a field of a line, which stands there and says nothing
    │   │   └── NoPrompts     a source whose keys let no prompt through
    │   ├── ModelError        a model that is absent or cannot be used
    │   └── MissingExtra      an optional library; names the install command
    └── RunError              a run failed; nothing done so far is lost   exit status 1
        ├── NothingKept       a stage kept nothing of all that it saw
        ├── EngineError       a backend could not answer
        └── TrainingError     the training rows or the training itself

A message says where (file, line, key), what was expected, what was found, and what to do next.
"""


class MisstepError(Exception):
    """Base of all deliberate errors; its text is shown to the user as it stands."""

    exit_status = 1


class InputError(MisstepError):
    """The input is wrong; raised before any model loads."""

    exit_status = 2


class RecipeError(InputError):
    """A recipe's key or value is wrong."""


class PolicyError(InputError):
    """A policy's key, blank or text is wrong."""


class DataError(InputError):
    """A data file, one of its lines, or one of its fields is wrong."""


class EmptyCell(DataError):
    """A field of a line is there and says nothing; some readers can do without the line."""

    def __init__(self, text: str, what: str) -> None:
        super().__init__(text)
        self.what = what
        """What there is none of, such as an answer."""


class NoPrompts(DataError):
    """What a source asks for, such as prompts with good answers, leaves no prompt."""


class ModelError(InputError):
    """A model is absent, unreadable, or lacks what the run needs."""


class MissingExtra(InputError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed; it is optional: pip install 'misstep[{extra}]'"
        )


class RunError(MisstepError):
    """A run failed; what was finished stays on disk and the same command goes on from there."""

    advice = "Nothing that was finished is lost: the same command goes on from there."


class NothingKept(RunError):
    """A stage kept nothing of all that it saw, and would keep nothing of it again."""

    advice = "Nothing that was finished is lost: change the recipe and run it again."


class EngineError(RunError):
    """A backend could not answer."""


class TrainingError(RunError):
    """The training rows, or the training itself, are unusable."""
