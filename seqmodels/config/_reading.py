"""From gin files and overrides to statements: gin's syntax, includes, and where each binding stands."""

import dataclasses
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from seqmodels.errors import InputError, nearest

COMMAND_LINE = "command line"
_REPOSITORY = Path(__file__).resolve().parents[2]


class Statement(NamedTuple):
    """A binding, or the definition of a macro. `place` is where it stands: `configs/x.gin:12`."""

    place: str
    scope: str
    selector: str
    parameter: str  # empty in the definition of a macro
    value: Any


class Text(NamedTuple):
    """Statements that stand in no file by themselves. `place`: what errors call it; `file`: the one
    beside which it looks for what it includes."""

    place: str
    text: str
    file: Path


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name` in a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/selector` in a value, `called` with `()` behind it."""

    scope: str
    selector: str
    called: bool


class Names(config_parser.ParserDelegate):
    """What gin's parser makes of `@name` and `%name`: nodes, looked up when everything has been read."""

    def __init__(self):
        self.macros: set[str] = set()

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        self.macros.add(macro_name)
        return Macro(macro_name)


def read_file(path: Path, names: Names, including: tuple[Path, ...] = ()) -> list[Statement]:
    """The statements of a file, with those of an included file in the place of its include."""
    chain = (*including, path)
    return _statements(_read_text(_file_text(path), str(path), names), path, names, chain)


def read_text(text: Text, names: Names) -> list[Statement]:
    """The statements of a text, with those of the files that it includes."""
    parsed = _read_text(text.text, text.place, names, numbered=False)
    return _statements(parsed, text.file, names, (text.file,))


def _statements(
    parsed: Iterable[tuple[str, Any]], path: Path, names: Names, chain: tuple[Path, ...]
) -> list[Statement]:
    """path: of the file that they stand in. chain: files of which each includes the next, down to this one."""
    statements = []
    for place, statement in parsed:
        if isinstance(statement, config_parser.BindingStatement):
            statements.append(Statement(place, *statement[:4]))
        elif isinstance(statement, config_parser.IncludeStatement):
            included = _find_included(statement.filename, path, place)
            if included.resolve() in [file.resolve() for file in chain]:
                raise InputError(f"{place}: include cycle: {' -> '.join(map(str, (*chain, included)))}")
            statements += read_file(included, names, chain)
        elif isinstance(statement, config_parser.ImportStatement):
            raise InputError(f"{place}: 'import' has no use here: constructors are registered in Python")
    return statements


def read_override(text: str, names: Names) -> Statement:
    """The one binding of an override, `Name.parameter=value`."""
    parsed = [statement for _, statement in _read_text(text, COMMAND_LINE, names, numbered=False)]
    if len(parsed) != 1 or not isinstance(parsed[0], config_parser.BindingStatement):
        raise InputError(
            f"{COMMAND_LINE}: expected one binding, such as --gin.train.steps=100, got --gin.{text}"
        )
    return Statement(COMMAND_LINE, *parsed[0][:4])


def _read_text(text: str, source: str, names: Names, numbered: bool = True) -> Iterator[tuple[str, Any]]:
    """Places, each with what gin's parser found there. numbered: whether places have the number of a line."""

    def place(line: int) -> str:
        return f"{source}:{line}" if numbered else source

    try:
        for statement in config_parser.ConfigParser(text, names):
            yield place(statement.location.line_num), statement
        return
    except SyntaxError as error:
        number, reason = error.lineno, error.msg
    except tokenize.TokenError as error:
        reason, (number, _) = error.args
    lines = text.splitlines()
    number = min(number, len(lines))  # the end of the file counts as a line, in some versions
    line = lines[number - 1].strip()
    # The versions of Python word these differently; what to do about them is the same.
    if any(words in reason for words in ("Failed to parse token", "Unable to parse value", "string literal")):
        reason = "not a value of gin; a string needs quotes, a macro is %NAME, a constructor @Name or @Name()"
        if source == COMMAND_LINE:
            key, _, value = line.partition("=")
            reason += f", and the shell must leave the quotes: --gin.{key}=\"'{value}'\""
    raise InputError(f"{place(number)}: syntax error in {line!r}: {reason.rstrip('.')}")


def _find_included(name: str, including: Path, place: str) -> Path:
    """Looks beside the including file, then in the current directory, then at the root of the repository."""
    paths = [folder / name for folder in (including.parent, Path(), _REPOSITORY)]
    for path in paths:
        if path.is_file():
            return path
    tried = " or ".join(dict.fromkeys(str(path.resolve()) for path in paths))
    raise InputError(f"{place}: cannot include {name!r}: there is no {tried}{_nearest_file(paths)}")


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config file {str(path)!r} does not exist{_nearest_file([path])}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {str(path)!r} cannot be read: {error}") from error


def _nearest_file(paths: Sequence[Path]) -> str:
    neighbours = {file.name for path in paths for file in path.parent.glob("*.gin")}
    return f"; {nearest(paths[0].name, neighbours)}" if neighbours else ""
