"""Policies over parameters: tables of (regular expression, value), matched against a parameter's path.

A path is the keys from the root of the tree, such as `blocks/mixer/q_proj/kernel`. An expression may match
anywhere in it (`re.search`); the first rule of a table that matches decides.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from seqmodels.errors import InputError

Rules = Sequence[tuple[str, Any]]


def parameter_paths(parameters: Any) -> list[str]:
    """The path of every parameter, in the order of `jax.tree.leaves`."""
    return [
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_leaves_with_path(parameters)
    ]


def apply_rules(rules: Rules, parameters: Any, *, otherwise: Rules, table: str) -> Any:
    """A tree like `parameters`, each leaf the number of the first rule that matches its path, or 1.0.

    The arguments are those of `values_by_rules`.
    """

    def check(pattern: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{table}: the value of {pattern!r} must be a number, not {value!r}")

    values = values_by_rules(rules, parameters, otherwise=(*otherwise, ("", 1.0)), table=table, check=check)
    return jax.tree.unflatten(jax.tree.structure(parameters), [float(value) for value in values])


def values_by_rules(
    rules: Rules, parameters: Any, *, otherwise: Rules, table: str, check: Callable[[str, Any], None]
) -> list[Any]:
    """The value of the first rule that matches, for every parameter, in the order of `jax.tree.leaves`.

    Args:
        rules: the user's table. Each rule must decide at least one parameter: a rule that decides none is a
            spelling mistake, or hidden by an earlier one.
        otherwise: rules tried after those, which need not match anything, but leave no parameter without one.
        table: the name of the user's table, for error messages.
        check: raises InputError for an expression's value that is none.
    """
    for rule in rules:
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)):
            raise InputError(f"{table}: a rule is a pair ('regular expression', value), not {rule!r}")
        check(*rule)
        try:
            re.compile(rule[0])
        except re.error as error:
            raise InputError(f"{table}: {rule[0]!r} is not a regular expression: {error}") from None

    paths = parameter_paths(parameters)
    table_of_all = [*rules, *otherwise]
    chosen = [
        next(i for i, (pattern, _) in enumerate(table_of_all) if re.search(pattern, path)) for path in paths
    ]
    for i, (pattern, _) in enumerate(rules):
        if i not in chosen:
            if any(re.search(pattern, path) for path in paths):
                raise InputError(
                    f"{table}: {pattern!r} never applies, earlier rules take all that it matches"
                )
            closest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
            raise InputError(f"{table}: {pattern!r} matches no parameter; the nearest is {closest!r}")
    return [table_of_all[i][1] for i in chosen]
