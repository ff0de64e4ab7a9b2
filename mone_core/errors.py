"""What the mathematics refuses, and how it says so.

```
MoneError                 anything a user of `mone_core` got wrong; one line, says what to do
|-- ConfigError           a configuration object holds values that cannot be
|-- CapacityError         a compute budget or a token count that cannot be met
|-- RoutingError          scores and counts that do not fit together
|-- ShapeError            images of another size or layout than the model was made for
`-- WeightsError          weights from elsewhere that are not what they must be
```

Broken invariants of our own are `assert`s, not members of this tree.
"""

from collections.abc import Sequence


class MoneError(ValueError):
    """Base of every error that `mone_core` raises on a user's mistake."""


class ConfigError(MoneError):
    """A configuration object was given values that cannot be; all of them are listed at once."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        super().__init__(f"{where}: " + "; ".join(problems))
        self._made_of = (where, tuple(problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, tuple[str, ...]]]:
        return type(self), self._made_of  # so that it survives the way out of a worker process


class CapacityError(MoneError):
    """A compute budget is out of reach, or counts do not add up."""


class RoutingError(MoneError):
    """Router scores and token counts do not fit together."""


class ShapeError(MoneError):
    """Images are of another size or layout than the model was made for."""


class WeightsError(MoneError):
    """Weights from elsewhere are of an unknown kind, not whole, or of another model."""
