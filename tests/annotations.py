"""The checker of annotations, shapes included, that `tests/conftest.py` lays around the package's functions."""

from collections.abc import Callable, Sequence

from beartype import BeartypeConf, FrozenDict, beartype

from infimed_jax.data.sample import Question, Sample

# beartype looks at an item of a sequence, drawn at random; of a prepared dataset it may be the damaged record.
_CONFIGURATION = BeartypeConf(hint_overrides=FrozenDict({Sequence[kind]: Sequence for kind in (Sample, Question)}))


def checked(function: Callable) -> Callable:
    """`function`, refusing arguments and results that are not as annotated.

    Constructors are left out: JAX rebuilds our dataclasses of arrays with shardings, shapes and placeholders in them.
    """
    return function if function.__name__ == "__init__" else beartype(conf=_CONFIGURATION)(function)
