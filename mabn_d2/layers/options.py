"""
What the options of a norm are, told by the signature of its class.

An option is a keyword argument of the constructor. Its default stands in the signature, what it
accepts in the annotation, what it is for in the docstring; configs, checks and messages derive from these:

    class Foo2d(nn.BatchNorm2d):
        @checked
        def __init__(self, num_features, strength: NonNegativeNumber = 0.5, affine=True): ...
"""

import functools
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple


class Accepted(NamedTuple):
    """What an argument may be: in words, and as a test that any object can be given."""

    words: str
    test: Callable[[Any], bool]


class CountsIterations:
    """Of an option that grows as the schedule does, when fewer workers take more iterations."""


class StandIn(NamedTuple):
    """Of an option for which a config may state a value that has its meaning from the rest of the config."""

    value: int
    meaning: str


def is_integer(value) -> bool:
    """Whether the value is an integer, which neither 2.0 nor True is."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether the value is a finite real number, which True is not."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _is_schedule(value) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return is_pair and all(map(is_integer, value)) and 0 <= value[0] <= value[1]


PositiveInteger = Annotated[
    int, Accepted("a positive integer", lambda value: is_integer(value) and value >= 1)
]
NonNegativeInteger = Annotated[
    int, Accepted("a non-negative integer", lambda value: is_integer(value) and value >= 0)
]
PositiveNumber = Annotated[
    float, Accepted("a positive number", lambda value: is_number(value) and value > 0)
]
NonNegativeNumber = Annotated[
    float, Accepted("a non-negative number", lambda value: is_number(value) and value >= 0)
]
Fraction = Annotated[
    float, Accepted("a number in (0, 1]", lambda value: is_number(value) and 0 < value <= 1)
]
AtLeastOne = Annotated[
    float, Accepted("a number of at least 1", lambda value: is_number(value) and value >= 1)
]
IterationCount = Annotated[NonNegativeInteger, CountsIterations()]
Lag = Annotated[int, Accepted("0 or 1", lambda value: is_integer(value) and value in (0, 1))]
Schedule = Annotated[
    tuple[int, int],
    Accepted("two iterations (start, end), 0 <= start <= end", _is_schedule),
    CountsIterations(),
]
OF_32_IMAGES = StandIn(0, "32 / images per worker")
TO_FIRST_DECAY = StandIn(-1, "the first of SOLVER.STEPS")
BatchesOf32Images = Annotated[PositiveInteger, OF_32_IMAGES]
WarmupIterations = Annotated[IterationCount, TO_FIRST_DECAY]

# Arguments that every norm may take and that are not options of a config.
_NOT_OPTIONS = ("self", "num_features", "affine", "device", "dtype")
# What a config can hold.
_PLAIN = (bool, int, float, str, tuple, list, type(None))


def options_of(norm: Callable) -> dict[str, Any]:
    """
    The options of a norm with their defaults.

    Args:
        norm: a class, or a function that makes a norm.

    Returns:
        name of each keyword argument with a default that a config can hold -> the default.
    """
    parameters = inspect.signature(norm).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in _NOT_OPTIONS and isinstance(parameter.default, _PLAIN)
    }


def marked_options(norm: Callable, mark: type) -> dict[str, Any]:
    """
    Args:
        norm: a class, or a function that makes a norm.
        mark: a class of this module whose instances stand in annotations.

    Returns:
        name of each argument whose annotation holds a mark of this class -> that mark.
    """
    function = norm.__init__ if inspect.isclass(norm) else norm
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: found
        for name, hint in hints.items()
        for found in getattr(hint, "__metadata__", ())
        if isinstance(found, mark)
    }


def check_options(
    norm: Callable, options: Mapping[str, Any], describe: Callable[[str], str] = str
) -> None:
    """
    Args:
        norm: a class, or a function that makes a norm.
        options: some of its arguments.
        describe: what the message calls an option.

    Raises:
        ValueError: an option is not what its annotation accepts. The message is one line.
    """
    accepted = marked_options(norm, Accepted)
    for option, value in options.items():
        if option in accepted and not accepted[option].test(value):
            raise ValueError(f"{describe(option)} must be {accepted[option].words}, got {value!r}")


def checked(init: Callable) -> Callable:
    """For the constructor of a norm: refuses arguments that its annotations do not accept."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked_init(self, *args, **kwargs):
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        check_options(init, arguments, lambda option: f"{type(self).__name__}: {option}")
        init(self, *args, **kwargs)

    return checked_init
