"""Errors: one tree, one line, and whole on the far side of a process boundary."""

import copy

import pytest

from mone_core import errors
from mone_core.errors import CapacityError, ConfigError, MoneError, RoutingError

EXAMPLES = [
    MoneError("what was wrong"),
    ConfigError("model", ["depth must be 1 or more, got 0", "heads must divide dim, got 5 and 8"]),
    CapacityError("budget 0.05 is out of reach"),
    RoutingError("3 tokens for 4 places"),
]


def test_every_error_is_a_mone_error_and_a_value_error():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    ours = [cls for cls in classes if issubclass(cls, Exception)]

    assert MoneError in ours
    assert all(issubclass(cls, MoneError) and issubclass(cls, ValueError) for cls in ours)


def test_the_tree_in_the_docstring_names_every_error():
    ours = [name for name in vars(errors) if name.endswith("Error")]

    assert [name for name in ours if name not in errors.__doc__] == []


def test_a_config_error_lists_all_problems_on_one_line():
    with pytest.raises(
        ConfigError, match=r"^model: depth must be 1 or more, got 0; heads must divide dim, .* 8$"
    ):
        raise EXAMPLES[1]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_can_be_copied_as_a_worker_process_does_to_report_it(error):
    """Sent to another process, an exception is rebuilt from its class and `args`."""
    other = copy.copy(error)

    assert type(other) is type(error)
    assert str(other) == str(error)
