"""What the mathematics refuses, and how it says so.

```
MoneError                 anything a user of `mone_core` got wrong; one line, says what to do
|-- ConfigError           a configuration object holds values that cannot be
|-- CapacityError         a compute budget or a token count that cannot be met
|-- RoutingError          scores and counts that do not fit together
`-- WeightsError          a state dict that does not fit the model
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


class CapacityError(MoneError):
    """A compute budget is out of reach, or counts do not add up."""


class RoutingError(MoneError):
    """Router scores and token counts do not fit together."""


class WeightsError(MoneError):
    """Weights do not fit the model they are loaded into."""
