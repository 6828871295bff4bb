"""Trees of parameters as flat dictionaries, and back: leaves named by their path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path


def flatten(tree: Any) -> dict[str, Any]:
    """`text.norm.scale` → leaf, in the tree's own order; names of attributes and numbers of items count as keys do."""
    return {keystr(path, simple=True, separator="."): leaf for path, leaf in tree_leaves_with_path(tree)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionaries that `flatten` names the leaves of."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def at(tree: Any, path: str) -> Any:
    """The leaf or branch at `text.layers`."""
    for name in path.split("."):
        tree = tree[name]
    return tree


def put(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A tree with `value` at `path`; what does not lie on the path is shared with the old one."""
    name, _, rest = path.partition(".")
    return {**tree, name: put(tree[name], rest, value) if rest else value}
