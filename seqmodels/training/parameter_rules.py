"""Policies over parameters: tables of (regular expression, value), matched against a parameter's path.

A path is the keys from the root of the tree, such as `blocks/mixer/q_proj/kernel`. An expression may match
anywhere in it (`re.search`); the first rule of a table that matches decides.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax

from seqmodels.errors import InputError

Rules = Sequence[tuple[str, float]]


def parameter_paths(parameters: Any) -> list[str]:
    """The path of every parameter, in the order of `jax.tree.leaves`."""
    return [
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_leaves_with_path(parameters)
    ]


def apply_rules(rules: Rules, parameters: Any, *, otherwise: Rules, table: str) -> Any:
    """A tree like `parameters`, each leaf the value of the first rule that matches its path.

    Args:
        rules: the user's table. Each rule must decide at least one parameter: a rule that decides none is a
            spelling mistake, or hidden by an earlier one.
        otherwise: rules tried after those, which need not match anything; parameters that none matches get
            1.0.
        table: the name of the user's table, for error messages.
    """
    for rule in rules:
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)):
            raise InputError(f"{table}: a rule is a pair ('regular expression', number), not {rule!r}")
        if isinstance(rule[1], bool) or not isinstance(rule[1], (int, float)):
            raise InputError(f"{table}: the value of {rule[0]!r} must be a number, not {rule[1]!r}")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise InputError(f"{table}: {rule[0]!r} is not a regular expression: {error}") from None

    paths = parameter_paths(parameters)
    table_of_all = [*rules, *otherwise]
    chosen = [
        next((i for i, (pattern, _) in enumerate(table_of_all) if re.search(pattern, path)), None)
        for path in paths
    ]
    for i, (pattern, _) in enumerate(rules):
        if i not in chosen:
            if any(re.search(pattern, path) for path in paths):
                raise InputError(
                    f"{table}: {pattern!r} never applies, earlier rules take all that it matches"
                )
            closest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
            raise InputError(f"{table}: {pattern!r} matches no parameter; the nearest is {closest!r}")
    values = [1.0 if i is None else float(table_of_all[i][1]) for i in chosen]
    return jax.tree.unflatten(jax.tree.structure(parameters), values)
