"""What the pipelines refuse, and how they say so.

```
PipelineError             a user's mistake: one line, exit code 2, nothing half-made left behind
|-- UsageError            a command or flag that does not exist, or lacks something
|-- ArchiveError          a raw archive that is missing, empty, cut off or mostly bad
|-- DatasetError          shards or manifest missing, changed or not fitting
|-- RunError              a run folder, checkpoint or configuration that does not fit
|-- RegistryError         no such model or alias in the registry
`-- StorageError          (pipelines.storage) a file or store that cannot be reached or is missing
RunFailedError                 our failure or the machine's: exit code 1
```
"""

import difflib
from collections.abc import Iterable


class PipelineError(Exception):
    """Base of every error that a user can mend; `mone` prints it as one line and exits with 2."""


class UsageError(PipelineError):
    """A command, flag or field that does not exist or lacks a value."""


class ArchiveError(PipelineError):
    """A raw archive is missing, holds no images, is cut off or mostly bad."""


class DatasetError(PipelineError):
    """Shards, index or manifest are missing, were changed, or do not fit the run."""


class RunError(PipelineError):
    """A run folder, checkpoint or configuration does not fit what was asked."""


class RegistryError(PipelineError):
    """The model registry lacks the model or alias that was asked for."""


class RunFailedError(Exception):
    """A run ended without finishing, through no fault of the user's input; exit code 1."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, next_step: str) -> str:
    """Word the error for a name nobody registered: near misses first, then how to see them all.

    Args:
        kind: What was looked up, as a user would call it ("recipe", "config field").
        name: The name that was not found.
        known: Every name that would have been.
        next_step: A sentence that ends the message, such as how to list all names.
    """
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "nothing similar exists."
    return f"no {kind} called {name!r}; {hint} {next_step}"
