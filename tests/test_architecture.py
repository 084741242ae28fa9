"""Which part of the code may import which: read off the sources, so that it holds for code no test runs."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "seqmodels"

# A part may import itself, `errors` and `notation`, and these.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "notation": set(),
    "files": set(),
    "machine": set(),
    "start_up": {"files"},
    "parameter_rules": set(),
    "ops": set(),
    "layers": {"ops"},
    "registry": {"ops", "layers"},
    "models": {"ops", "layers", "registry"},
    "parallel": {"parameter_rules", "start_up"},
    "data": set(),
    "training": {"ops", "layers", "registry", "models", "data", "parallel", "parameter_rules", "files", "machine"},
    "config": set(),
    "constructors": {"config", "registry", "layers", "models", "data", "training", "evaluation"},
    "evaluation": {"ops", "layers", "registry", "models", "data", "parallel", "training"},
    "interop": {"ops", "layers", "registry", "models", "training"},
}
# Programs are at the end of every arrow.
PROGRAMS = {"tools"}
# Packages that only some parts may import.
RESERVED = {
    "gin": {"config"},
    "flax": {"layers", "models", "training", "interop", "evaluation", *PROGRAMS},
    "optax": {"training", *PROGRAMS},
    "orbax": {"training", *PROGRAMS},
    "grain": {"data", "training", *PROGRAMS},
    "lm_eval": {"evaluation", *PROGRAMS},
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Full names of the modules, and of the names taken from them, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(part: str, source: str) -> list[str]:
    found = []
    for name in sorted(imports(source)):
        root, *rest = name.split(".")
        if root == "seqmodels" and rest and part not in PROGRAMS:
            target = rest[0]
            if target not in ALLOWED[part] | {part, "errors", "notation", "__version__"}:
                found.append(f"{part} may not import {name}")
        if root in RESERVED and part not in RESERVED[root] | PROGRAMS - (
            {"tools"} if root == "gin" else set()
        ):
            found.append(f"{part} may not import {name}")
        if root in ("tests", "train"):
            found.append(f"{part} may not import {name}")
    return found


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_import_direction(file):
    part = part_of(file)
    if part == "__init__":
        assert not imports(file.read_text()), (
            "seqmodels itself imports nothing: a layer user pays for layers alone"
        )
        return
    assert part in ALLOWED or part in PROGRAMS, f"{part} is new: say here what it may import"
    assert not violations(part, file.read_text())


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "from seqmodels.layers import Mixer"),
        ("ops", "import flax.linen as nn"),
        ("layers", "from seqmodels import models"),
        ("layers", "from seqmodels.registry import MIXERS"),
        ("models", "def f():\n    import gin"),
        ("data", "from seqmodels.training import train"),
        ("training", "from seqmodels import config"),
        ("config", "from seqmodels.registry import MIXERS"),
        ("tools", "import gin"),
        ("training", "import train"),
    ],
)
def test_a_wrong_import_is_found(part, source):
    assert violations(part, source)


def test_kernels_know_only_jax():
    """Kernels are usable without this package, so they may import nothing of it and nothing of Flax."""
    for file in sorted((REPOSITORY / "pallas_kernels").rglob("*.py")):
        roots = {name.split(".")[0] for name in imports(file.read_text())}
        assert not roots & {"seqmodels", "flax", "tests"}, f"{file}: {roots}"


def test_no_branch_on_the_name_of_a_mixer():
    """Outside the registry no expression compares with a mixer's name."""
    from seqmodels.registry import MIXERS

    for file in sources():
        if part_of(file) == "registry":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Compare, ast.Match)):
                constants = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                named = {value for value in constants if isinstance(value, str)} & set(MIXERS)
                assert not named, f"{file.relative_to(REPOSITORY)}, line {node.lineno}: a branch on {named}"
