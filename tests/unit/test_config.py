"""Configs: what they set, what they refuse and in which words, and what is written down of them."""

import argparse
import collections.abc
import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from seqmodels import config
from seqmodels.config._constructors import constructors
from seqmodels.config._types import Produced, accepts, describe, produced
from seqmodels.errors import InputError

# A job in small: a function, linen modules, dataclasses, and two constructors of one name.


class Scale(nn.Module):
    """Learns one factor per channel."""

    d_model: int
    initial: float = 1.0
    dtype: jax.typing.DTypeLike = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = nn.silu

    @nn.compact
    def __call__(self, x):
        factor = self.param("factor", nn.initializers.constant(self.initial), (self.d_model,))
        return self.activation(x * factor).astype(self.dtype)


class Stack(nn.Module):
    """Calls a constructor of layers."""

    layer: Callable[..., nn.Module] = Scale
    depth: int = 1

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = self.layer(d_model=x.shape[-1])(x)
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    learning_rate: float = 1e-3
    clip_norm: float | None = 1.0
    multipliers: Sequence[tuple[str, float]] = ()
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass
class Text:
    path: str
    length: int = 8
    seed: int = dataclasses.field(default=0, kw_only=True)
    notes: list[str] = dataclasses.field(default_factory=list)


class Pairs:
    def __init__(self, count: int = 4, *, kind: Literal["near", "far"] = "near"):
        self.count, self.kind = count, kind


class Norm:
    def __init__(self, eps: float = 1e-6):
        self.eps = eps


def norm_function(eps: float = 1e-6) -> float:
    return eps


def train(
    data: Any, rule: Rule, model: nn.Module | None = None, *, steps: int = 10, log: bool = False
) -> dict:
    return {"data": data, "rule": rule, "model": model, "steps": steps, "log": log}


@contextlib.contextmanager
def only_registered(some: dict):
    """What else this process has registered under the same names is out of the way meanwhile."""
    outside = dict(constructors)
    constructors.clear()
    constructors.update(some)
    config.clear()
    yield
    config.clear()
    constructors.clear()
    constructors.update(outside)


with only_registered({}):
    train = config.register(train)
    norm_function = config.register(norm_function, name="Norm", module="functions")
    for _cls in (Scale, Stack, Rule, Text, Pairs, Norm):
        assert config.register(_cls) is _cls
    TOYS = dict(constructors)


@pytest.fixture(autouse=True)
def _toys_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with only_registered(TOYS):
        yield


def write(name: str, text: str) -> str:
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(name, "w") as file:
        file.write(text)
    return name


def read(text: str, *overrides: str) -> None:
    config.parse([write("x.gin", text)], overrides)


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Composition.


def test_bindings_fill_in_what_the_caller_leaves_out():
    read(
        "Rule.learning_rate = 3\nText.path = 'a'\nText.length = 5\ntrain.data = @Text()\ntrain.rule = @Rule()"
    )
    job = train()
    assert job["data"] == Text("a", 5) and job["rule"].learning_rate == 3 and job["steps"] == 10
    assert Text("b", length=6) == dataclasses.replace(Text("a", 5), path="b", length=6)
    assert Text("b").length == 5


def test_macros_scopes_blocks_and_constants():
    read(
        "N = 7\nHALF = %N\nText.path = 'all'\neval/Text.length = %HALF\n"
        "eval/inner/Text.seed = 1\nScale:\n  # in a block\n  initial = 2.0\n  dtype = %bfloat16\n"
        "train.data = [@Text(), @eval/Text(), {'deep': @eval/inner/Text()}]\ntrain.rule = @Rule()\n"
        "train.model = @Stack()\nStack.layer = @Scale\nScale.activation = %gelu"
    )
    plain, scoped, inner = train()["data"]
    assert (plain.length, scoped.length, inner["deep"].length, inner["deep"].seed) == (8, 7, 7, 1)
    layer = Scale(d_model=2)
    assert layer.initial == 2.0 and layer.dtype is jnp.bfloat16 and layer.activation is nn.gelu


def test_a_reference_makes_a_new_object_each_time_even_through_a_macro():
    read("DATA = @Pairs()\ntrain.data = [%DATA, %DATA]\ntrain.rule = @Rule()")
    first, second = train()["data"]
    assert first is not second
    assert train()["data"][0] is not first


def test_a_scoped_constructor_is_one_object():
    read("Stack.layer = @wide/Scale\nwide/Scale.initial = 2.0")
    assert Stack() == Stack() and hash(Stack()) == hash(Stack())
    assert Stack().layer(d_model=1).initial == 2.0 and Scale(d_model=1).initial == 1.0


def test_the_last_binding_wins():
    write("base.gin", "Rule.learning_rate = 1.0\nRule.clip_norm = 1.0\nN = 1\nPairs.count = %N")
    write("later.gin", "Rule.learning_rate = 3.0")
    files = [write("x.gin", "include 'base.gin'\nRule.learning_rate = 2.0\nN = 2"), "later.gin"]
    config.parse(files[:1])
    assert (Rule().learning_rate, Rule().clip_norm, Pairs().count) == (2.0, 1.0, 2)
    config.parse(files)
    assert Rule().learning_rate == 3.0
    config.parse(files, ["Rule.learning_rate=4.0", "Rule.learning_rate = 5.0", "N=3"])
    assert (Rule().learning_rate, Pairs().count) == (5.0, 3)


def test_includes_are_found_beside_the_file_in_the_directory_and_in_the_repository(tmp_path, monkeypatch):
    write("configs/sizes/toy.gin", "Pairs.count = 1")
    write("configs/tasks/near.gin", "Pairs.kind = 'far'")
    write("configs/tasks/x.gin", "include 'near.gin'\ninclude 'configs/sizes/toy.gin'")
    config.parse(["configs/tasks/x.gin"])
    assert (Pairs().count, Pairs().kind) == (1, "far")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = tmp_path / "configs" / "tasks" / "x.gin"
    message = error_of(lambda: config.parse([path]))
    assert f"{path}:2: cannot include 'configs/sizes/toy.gin': there is no {tmp_path}" in message
    assert str(tmp_path / "elsewhere" / "configs" / "sizes" / "toy.gin") in message
    monkeypatch.setattr("seqmodels.config._reading._REPOSITORY", tmp_path)
    config.parse([path])
    assert Pairs().count == 1


def test_a_second_config_replaces_the_first_and_a_wrong_one_does_not():
    read("Pairs.count = 9")
    assert Pairs().count == 9
    error_of(lambda: read("Pairs.count = 'x'"))
    assert Pairs().count == 9
    read("Rule.learning_rate = 1.0")
    assert Pairs().count == 4
    assert "Pairs" not in config.config_text() and "count = 9" not in config.operative_config()


# Errors: the words that a person sees.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Pairz.count = 1", "x.gin:1: nothing configurable is named 'Pairz': did you mean 'Pairs'?"),
        ("\n# a comment\nPairs.cuont = 1", "x.gin:3: Pairs has no parameter 'cuont': did you mean 'count'?"),
        (
            "Pairs:\n  kind = 'far'\n  cuont = 1",
            "x.gin:3: Pairs has no parameter 'cuont': did you mean 'count'?",
        ),
        ("train.data = @Txt()", "x.gin:1: nothing configurable is named 'Txt': did you mean 'Text'?"),
        ("N = 1\nPairs.count = %M\nText.length = %N", "x.gin:2: no macro or constant is named 'M': "),
        (
            "train.data = [%bfloat61]",
            "x.gin:1: no macro or constant is named 'bfloat61': did you mean 'bfloat16'?",
        ),
        ("N = %N\nPairs.count = %N", "x.gin:1: the macro 'N' is defined by itself"),
        (
            "DIM = 1\nDMI = 2\nPairs.count = %DIM",
            "x.gin:2: nothing refers to the macro 'DMI': did you mean 'DIM'?",
        ),
        ("count = 2", "x.gin:1: nothing refers to the macro 'count': to set a parameter, write Pairs.count"),
        ("M = 2", "x.gin:1: nothing refers to the macro 'M'"),
        (
            "float32 = 2\nPairs.count = %float32",
            "x.gin:1: %float32 is a constant; give the macro another name",
        ),
        ("Norm.eps = 1.0", "x.gin:1: 'Norm' is ambiguous: write functions.Norm or "),
        ("Scale.name = 'a'", "x.gin:1: Scale has no parameter 'name': "),
        ("Scale.parent = None", "x.gin:1: Scale has no parameter 'parent': "),
        ("Text.self = 1", "x.gin:1: Text has no parameter 'self': "),
        ("import os", "x.gin:1: 'import' has no use here"),
        (
            "Pairs.count = 1\nText.path = corpus",
            "x.gin:2: syntax error in 'Text.path = corpus': not a value of gin; a ",
        ),
        ("Pairs.count 1", "x.gin:1: syntax error in 'Pairs.count 1': "),
        ("Pairs.count =\n", "x.gin:1: syntax error in 'Pairs.count =': not a value of gin"),
        (
            "Pairs.count = 1\nText.path = 'a\n",
            'x.gin:2: syntax error in "Text.path = \'a": not a value of gin',
        ),
        ("train.data = [1,\n  2", "x.gin:2: syntax error in '2': "),
        ("Pairs.count = 2 * 3", "x.gin:1: syntax error in 'Pairs.count = 2 * 3': "),
        ("Pairs:\n  count = 1\n kind = 'far'", "x.gin:3: syntax error in \"kind = 'far'\": "),
        ("include 'x.gin'", "x.gin:1: include cycle: x.gin -> x.gin"),
        ("include 'none.gin'", "x.gin:1: cannot include 'none.gin': there is no "),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(text, message):
    assert error_of(lambda: read(text)).startswith(message)


def test_files_that_cannot_be_read():
    write("tiny.gin", "")
    assert (
        error_of(lambda: config.parse(["tinny.gin"]))
        == "config file 'tinny.gin' does not exist; did you mean 'tiny.gin'?"
    )
    assert "'.' cannot be read" in error_of(lambda: config.parse(["."]))
    with open("latin.gin", "wb") as file:
        file.write(b"# caf\xe9")
    assert "'latin.gin' cannot be read" in error_of(lambda: config.parse(["latin.gin"]))


def test_an_include_cycle_over_two_files_names_the_way_round():
    write("b.gin", "include 'a.gin'")
    message = error_of(lambda: config.parse([write("a.gin", "\ninclude 'b.gin'")]))
    assert message == "b.gin:1: include cycle: a.gin -> b.gin -> a.gin"


def test_an_error_in_an_included_file_names_that_file():
    write("sub/b.gin", "\nPairs.cuont = 1")
    assert error_of(lambda: read("include 'sub/b.gin'")).startswith("sub/b.gin:2: Pairs has no parameter")


def test_a_longer_name_ends_the_ambiguity():
    read("functions.Norm.eps = 2.0\ntest_config.Norm.eps = 3.0")
    assert norm_function() == 2.0 and Norm().eps == 3.0
    assert "functions.Norm.eps = 2.0" in config.config_text()


def test_a_missing_argument_is_an_error_of_the_config():
    read("train.rule = @Rule()\ntrain.data = @Text()")
    assert error_of(train) == "Text needs a value for 'path': set Text.path in the config"


def test_exceptions_pass_through_configured_calls_unchanged():
    class Strict:
        def __init__(self, error: type):
            raise error("one line")

    config.register(Strict)
    for kind in (InputError, KeyError):
        with pytest.raises(kind) as caught:
            Strict(kind)
        assert type(caught.value) is kind and caught.value.args == ("one line",)


# Types.


@pytest.mark.parametrize(
    ("binding", "expected", "got"),
    [
        ("Rule.learning_rate = 'abc'", "float", "str"),
        ("Rule.learning_rate = True", "float", "bool"),
        ("Rule.learning_rate = None", "float", "None"),
        ("Rule.learning_rate = @Pairs()", "float", "Pairs"),
        ("Rule.learning_rate = @Pairs", "float", "a constructor"),
        ("Rule.learning_rate = %bfloat16", "float", "a constant"),
        ("Pairs.count = True", "int", "bool"),
        ("Pairs.count = 1.0", "int", "float"),
        ("Pairs.kind = 'middle'", "Literal['near', 'far']", "str"),
        ("Text.path = 3", "str", "int"),
        ("train.log = 1", "bool", "int"),
        ("Rule.betas = (0.9, 0.95, 0.99)", "tuple[float, float]", "tuple"),
        ("Rule.betas = [0.9, 0.95]", "tuple[float, float]", "list"),
        ("Rule.betas = (0.9, '0.95')", "tuple[float, float]", "tuple"),
        ("Rule.multipliers = 'head'", "Sequence[tuple[str, float]]", "str"),
        ("Rule.multipliers = (('head', 'x'),)", "Sequence[tuple[str, float]]", "tuple"),
        ("Rule.clip_norm = 'none'", "float | None", "str"),
        ("Scale.activation = 'gelu'", "Callable[[Array], Array]", "str"),
        ("Scale.dtype = 3", "DTypeLike", "int"),
        ("train.rule = @Rule", "Rule", "a constructor"),
        ("train.rule = @Pairs()", "Rule", "Pairs"),
        ("Pairs.count = @functions.Norm()", "int", "float"),
        ("train.model = @Pairs()", "Module | None", "Pairs"),
    ],
)
def test_a_value_of_another_type_is_refused(binding, expected, got):
    message = error_of(lambda: read(f"\n{binding}"))
    assert message.startswith(f"x.gin:2: {binding}: expected ") and message.endswith(f", got {got}")
    if expected != "DTypeLike":  # its members differ between versions of jax
        assert f"expected {expected}," in message


@pytest.mark.parametrize(
    "binding",
    [
        "Rule.learning_rate = 1",
        "Rule.learning_rate = 1e-05",
        "Rule.learning_rate = @norm_value/functions.Norm()",
        "Rule.clip_norm = None",
        "Rule.multipliers = [('head', 1), ('tail', 0.5)]",
        "Rule.betas = (0, 1)",
        "Pairs.kind = 'far'",
        "Scale.dtype = 'bfloat16'",
        "Scale.dtype = %bfloat16",
        "Scale.activation = %relu",
        "Scale.activation = @functions.Norm",
        "Stack.layer = @Scale",
        "Stack.layer = @wide/Scale",
        "train.model = @Stack()",
        "train.model = None",
        "train.rule = @Rule()",
        "train.data = {'a': (1, [2.0, None])}",
    ],
)
def test_a_value_that_fits_is_taken(binding):
    read(binding)
    assert config.config_text() == f"{binding}\n"


def test_a_macro_is_judged_where_it_is_used():
    message = error_of(lambda: read("LR = 'abc'\n\nRule.learning_rate = %LR\nText.path = %LR"))
    assert message == "x.gin:3: Rule.learning_rate = %LR ('abc'): expected float, got str"


def test_the_rules_of_types():
    class Open(typing.Protocol):
        dtype: Any

    number = typing.NewType("number", int)
    for hint, value, fits in [
        (int, 3, True),
        (float, 3, True),
        (int, 3.0, False),
        (bool, False, True),
        (Any, object(), True),
        (object, "a", True),
        (None, None, True),
        (list[int], [1, "2"], False),
        (list[int], (1,), False),
        (Sequence[str], "abc", False),
        (Mapping[str, int], {"a": 1}, True),
        (Mapping[str, int], {"a": "1"}, False),
        (dict, {}, True),
        (tuple[str, ...], (), True),
        (tuple[str, ...], ("a", 1), False),
        (type[nn.Module], Scale, True),
        (type[nn.Module], Rule, False),
        (type, Scale, True),
        (collections.abc.Callable, print, True),
        (Callable[..., nn.Module], Scale, True),
        (Callable[..., nn.Module] | None, Rule, False),
        (Callable[..., nn.Module], lambda: 3, True),
        (Callable, Produced(Scale), True),
        (Callable, Produced(Rule), False),
        (float, Produced(int), True),
        (Callable, produced(Callable[[int], int]), True),
        (Sequence[int], produced(Callable[[int], int]), False),
        (int, produced(str | int), True),
        (int, Produced(None), True),
        (Open, 3, False),
        (Open, jnp.float32, True),
        (np.dtype, jnp.bfloat16, True),
        (np.dtype, np.dtype("int8"), True),
        (np.dtype, "int8", False),
        (number, "anything: not judged", True),
        (typing.Optional[Literal[1, "a"]], True, False),  # noqa: UP045
        (typing.Optional[Literal[1, "a"]], 1, True),  # noqa: UP045
    ]:
        assert accepts(hint, value) is fits, (hint, value)
    assert describe(tuple[int, ...]) == "tuple[int, ...]" and describe(Scale) == "Scale"


# Use.


def job():
    Stack()
    return train()


JOB = "train.data = @Text()\ntrain.rule = @Rule()\nText.path = 'a'\n"


def test_all_used_passes():
    read(JOB + "Rule.learning_rate = 1.0\nStack.depth = 2")
    job()
    config.check_all_used()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Pairs.count = 1",
            "x.gin:4: Pairs.count has no effect: this job never calls Pairs; valid: Rule, Stack, ",
        ),
        (
            "Pairs.count = 1\nPairs.kind = 'far'",
            "x.gin:4: Pairs.count has no effect: this job never calls Pairs; "
            "valid: Rule, Stack, Text, train; nor have Pairs.kind (x.gin:5)",
        ),
        (
            "evl/Text.length = 1",
            "x.gin:4: evl/Text.length has no effect: Text is never called in scope 'evl'",
        ),
        (
            "train.model = @evals/Stack()\nevl/Stack.depth = 1",
            "x.gin:5: evl/Stack.depth has no effect: Stack is never called in scope 'evl'; did you mean "
            "'evals'?",
        ),
        (
            "train.data = @eval/Text()\nText.length = 1\neval/Text.length = 2",
            "x.gin:5: Text.length has no effect: each call passes its own value, or has another one bound",
        ),
    ],
)
def test_a_binding_that_changes_nothing_is_an_error(text, message):
    read(JOB + text)
    job()
    assert error_of(config.check_all_used).startswith(message)


def test_a_binding_that_every_caller_overrules_is_an_error():
    read("Scale.d_model = 64\nStack.depth = 1")
    Stack().init(jax.random.key(0), jnp.ones((1, 4)))
    assert "Scale.d_model has no effect: each call passes its own value" in error_of(config.check_all_used)


def test_nothing_is_used_before_anything_was_called():
    read(JOB)
    assert "it calls nothing at all" in error_of(config.check_all_used)


def test_an_overridden_use_of_a_macro_is_no_error():
    read("N = 2\nPairs.count = %N", "Pairs.count=3")
    assert Pairs().count == 3
    config.check_all_used()


# Text.


def test_the_operative_config_has_what_was_used_with_defaults_and_can_be_read_again():
    text = JOB + (
        "N = 5\neval/Text.length = %N\ntrain.data = (@Text(), @eval/Text())\n"
        "Rule.multipliers = (('head', 0.5),)\n"
        "train.model = @Stack()\nStack.layer = @wide/Scale\nwide/Scale.dtype = %bfloat16\nPairs.count = 1\n"
    )

    def run():
        train()["model"].init(jax.random.key(0), jnp.ones((1, 4)))
        return config.operative_config()

    read(text)
    used = run()
    assert used == (
        "Rule.betas = (0.9, 0.95)\nRule.clip_norm = 1.0\nRule.learning_rate = 0.001\n"
        "Rule.multipliers = (('head', 0.5),)\n\n"
        "wide/Scale.activation = %silu\nwide/Scale.dtype = %bfloat16\nwide/Scale.initial = 1.0\n\n"
        "Stack.depth = 1\nStack.layer = @wide/Scale\n\n"
        "Text.length = 8\nText.path = 'a'\nText.seed = 0\n\n"
        "eval/Text.length = 5\neval/Text.path = 'a'\neval/Text.seed = 0\n\n"
        "train.data = (@Text(), @eval/Text())\ntrain.log = False\ntrain.model = @Stack()\n"
        "train.rule = @Rule()\ntrain.steps = 10\n"
    )
    read(used)
    assert run() == used
    config.check_all_used()


def test_values_survive_being_written_and_read():
    values = [
        'it\'s "quoted"\n',
        1e-30,
        float("inf"),
        -float("inf"),
        -3,
        None,
        True,
        (1,),
        (),
        [[]],
        {"a": (1, {})},
    ]
    read(f"train.data = {values!r}".replace("inf", "1e999"))
    text = config.config_text()
    assert text.count("\n") == 1
    assert train(rule=None)["data"] == values
    read(text)
    assert train(rule=None)["data"] == values and config.config_text() == text


def test_the_text_of_a_config_does_not_depend_on_how_it_is_composed():
    read("Rule.learning_rate = 1.0\nPairs.count = 8\ntrain.data = @Pairs()\neval/Pairs.count = 1")
    plain = config.config_text()
    write("sub/size.gin", "N = 4  # overridden\nPairs.count = %N")
    write(
        "y.gin",
        "# other words\ninclude 'sub/size.gin'\neval/Pairs:\n  count = 1\nN = 8\ntrain.data = @Text()",
    )
    config.parse(["y.gin"], ["Rule.learning_rate=1.0", "train.data=@test_config.Pairs()"])
    assert config.config_text() == plain
    assert config.diff(plain, plain) == ""


def test_diff_has_the_changed_bindings_only():
    read("Rule.learning_rate = 1.0\nPairs.count = 8\nPairs.kind = 'far'")
    old = config.config_text()
    read("Rule.learning_rate = 1.0\nPairs.count = 9\nText.length = 1")
    assert config.diff(old, config.config_text()) == (
        "- Pairs.count = 8\n+ Pairs.count = 9\n- Pairs.kind = 'far'\n+ Text.length = 1"
    )


# The command line.


def test_overrides_are_taken_out_of_the_command_line():
    argv = [
        "--config",
        "x.gin",
        "--gin.a/Pairs.count=3",
        "--steps=1",
        "--gin.N=[1, 2]",
        "--ginger",
        "--gin.A.b=c=d",
    ]
    rest, overrides = config.split_overrides(argv)
    assert rest == ["--config", "x.gin", "--steps=1", "--ginger"]
    assert overrides == ["a/Pairs.count=3", "N=[1, 2]", "A.b=c=d"]
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    assert parser.parse_args(["--config", "a.gin", "--config", "b.gin"]).config == ["a.gin", "b.gin"]
    assert "--gin.NAME.PARAMETER=VALUE" in parser.format_help()


@pytest.mark.parametrize(
    "argument", ["--gin.Pairs.count", "--gin.Pairs.count=", "--gin", "-gin.N=1", "--gin.=1"]
)
def test_a_malformed_override_is_refused(argument):
    message = error_of(lambda: config.split_overrides([argument, "3"]))
    assert message.startswith(
        f"command line: {argument!r} is not an override; write --gin.NAME.PARAMETER=VALUE"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("Pairs.cuont=1", "command line: Pairs has no parameter 'cuont': did you mean 'count'?"),
        ("Rule.learning_rate='abc'", "command line: Rule.learning_rate = 'abc': expected float, got str"),
        ("Text.path=corpus", "--gin.Text.path=\"'corpus'\""),
        ("DMI=3", "command line: nothing refers to the macro 'DMI': did you mean 'DIM'?"),
        ("Pairs.count=1\nText.length=2", "command line: expected one binding"),
    ],
)
def test_a_wrong_override_is_told(override, message):
    with pytest.raises(InputError) as caught:
        read("DIM = 4\nPairs.count = %DIM", override)
    assert message in str(caught.value)


# Registration leaves classes as they were.


def test_registering_again_changes_nothing():
    before = Scale.__init__
    assert config.register(Scale) is Scale and Scale.__init__ is before
    assert config.register(train) is train and config.register(train.__wrapped__) is train
    with pytest.raises(ValueError, match="registered already"):
        config.register(type("Norm", (), {"__init__": lambda self: None}), module="functions")
    with pytest.raises(TypeError, match="no __init__"):
        config.register(typing.NamedTuple("Point", [("x", int)]))


def test_a_registered_linen_module_is_a_linen_module():
    read("Scale.initial = 3.0\nScale.d_model = 4")
    layer = Scale()
    assert layer == Scale(4, 3.0) == Scale(d_model=4) and hash(layer) == hash(Scale(4, 3.0))
    assert "initial = 3.0" in repr(layer)
    assert layer.clone(initial=1.0).initial == 1.0 and layer.copy(d_model=5).d_model == 5
    assert copy.copy(layer) == layer
    assert Scale(name="mine").name == "mine"
    x = jnp.ones((2, 4))
    variables = layer.init(jax.random.key(0), x)
    assert jnp.array_equal(variables["params"]["factor"], jnp.full(4, 3.0))
    assert jnp.array_equal(jax.jit(layer.apply)(variables, x), layer.apply(variables, x))
    assert "name" not in config.operative_config() and "parent" not in config.operative_config()


class Block(nn.Module):
    """Not registered, so that flax's transforms may subclass it."""

    @nn.compact
    def __call__(self, x, _):
        return Scale(d_model=x.shape[-1], name="scale")(x), None


def test_bindings_reach_layers_inside_scan_and_remat():
    read("Scale.initial = 3.0")
    x = jnp.ones((2, 4))

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    variables = Scanned().init(jax.random.key(0), x)
    factor = variables["params"]["layers"]["scale"]["factor"]
    assert jnp.array_equal(factor, jnp.full((3, 4), 3.0))
    gradient = jax.grad(lambda v: Scanned().apply(v, x).sum())(variables)
    assert jnp.all(jnp.isfinite(gradient["params"]["layers"]["scale"]["factor"]))


def test_subclasses_made_by_a_transform_keep_to_what_they_are_given():
    read("Scale.initial = 3.0")
    rematerialised = nn.remat(Scale)(d_model=4)
    assert rematerialised.initial == 1.0
    given = nn.remat(Scale)(d_model=4, initial=3.0)
    variables = given.init(jax.random.key(0), jnp.ones((1, 4)))
    assert jnp.array_equal(variables["params"]["factor"], jnp.full(4, 3.0))
    assert "Scale.initial has no effect" in error_of(config.check_all_used)


def test_a_registered_dataclass_is_a_dataclass():
    read("Rule.learning_rate = 2.0\nText.path = 'a'")
    assert (
        Rule() == Rule(learning_rate=2.0) and dataclasses.replace(Rule(), clip_norm=None).learning_rate == 2.0
    )
    assert [field.name for field in dataclasses.fields(Rule)] == [
        "learning_rate",
        "clip_norm",
        "multipliers",
        "betas",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rule().learning_rate = 1.0
    assert Text().notes == [] and Text().notes is not Text().notes
    with pytest.raises(TypeError, match="unexpected keyword"):
        Rule(learning_rat=1.0)


def test_a_function_of_another_library_can_be_registered():
    schedule = config.register(optax.linear_schedule)
    read(
        "linear_schedule.init_value = 1.0\nlinear_schedule.end_value = 0.0\n"
        "linear_schedule.transition_steps = 4"
    )
    assert schedule()(2) == 0.5
    config.check_all_used()


def test_scopes_belong_to_a_thread():
    read("Text.path = 'root'\nother/Text.path = 'other'\ntrain.data = @other/Text()\ntrain.rule = @Rule()")
    paths, start = [], threading.Barrier(4)

    def work(number):
        start.wait()
        for _ in range(50):
            paths.append((number % 2, Text().path if number % 2 else train()["data"].path))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 200 and set(paths) == {(0, "other"), (1, "root")}


def test_errors_and_layers_do_not_need_gin():
    program = "import sys, seqmodels.errors, seqmodels.training.optimizer; sys.exit('gin' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
