"""The checker of annotations, shapes included, that `tests/conftest.py` lays around the package's functions."""

from collections.abc import Callable

from beartype import beartype


def checked(function: Callable) -> Callable:
    """`function`, refusing arguments and results that are not as annotated.

    Constructors are left out: JAX rebuilds our dataclasses of arrays with shardings, shapes and placeholders in them.
    """
    return function if function.__name__ == "__init__" else beartype(function)
