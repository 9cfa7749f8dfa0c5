"""Rows of the tables in configs/README.md, made from the dataclasses.

python -m tests.helpers.config_table

prints all tables, for a field that was added. The meaning of a field is the comment on its line, or
its entry under `Attributes:` in the docstring of its class.
"""

import ast
import dataclasses
import inspect
import pathlib
import re
import textwrap
import typing

from blocktx.config import RunConfig

README = pathlib.Path(__file__).parents[2] / "configs" / "README.md"


def config_classes() -> list[type]:
    """Return RunConfig and all dataclasses below it, in reading order."""
    found: dict[type, None] = {}

    def visit(hint: object) -> None:
        if dataclasses.is_dataclass(hint):
            if hint not in found:
                found[hint] = None
                for other in typing.get_type_hints(hint).values():
                    visit(other)
            return
        for argument in typing.get_args(hint):
            visit(argument)

    visit(RunConfig)
    return list(found)


def rows(cls: type) -> dict[str, tuple[str, str]]:
    """Return the type and the default of each field, as a table writes them."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: (_type(hints[field.name]), _default(field)) for field in dataclasses.fields(cls)
    }


def table(cls: type) -> list[str]:
    """Return the rows of a class as Markdown, with meanings from the source."""
    meanings = _meanings(cls)
    return [
        f"| `{name}` | {kind} | {default} | {meanings.get(name, '')} |"
        for name, (kind, default) in rows(cls).items()
    ]


def written() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Return the rows that configs/README.md has, by class and field."""
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    current: dict[str, tuple[str, str, str]] = {}
    for line in README.read_text().splitlines():
        if heading := re.match(r"## .*`(\w+)`$", line):
            current = found.setdefault(heading[1], {})
        elif row := re.match(r"\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", line):
            current[row[1]] = (row[2], row[3], row[4].strip())
    return found


def _type(hint: object) -> str:
    if dataclasses.is_dataclass(hint):
        return hint.__name__
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return f"{_type(inner)}, ..." if dataclasses.is_dataclass(inner) else "pairs"
    if arguments := typing.get_args(hint):
        return " or ".join(_type(argument) for argument in arguments)
    return "unset" if hint is type(None) else hint.__name__


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "see class"
    if dataclasses.is_dataclass(field.default):
        return "its defaults"
    if isinstance(field.default, tuple):
        return "one, its defaults" if field.default else "none"
    default = str(field.default).replace("|", r"\|")  # which ends a cell, even in code
    return {None: "unset", "": "empty"}.get(field.default, f"`{default}`")


def _meanings(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:
            if isinstance(node, ast.AnnAssign):
                code, _, comment = lines[node.lineno - 1].partition("  # ")
                if comment and code.strip():
                    found[node.target.id] = comment
        doc = inspect.cleandoc(base.__doc__ or "")
        attributes = doc.partition("Attributes:\n")[2]
        for names, text in re.findall(r"^  ([\w, ]+): ((?:.+\n?(?:    .*\n?)*))", attributes, re.M):
            for name in names.split(", "):
                found[name] = " ".join(text.split())
    return found


if __name__ == "__main__":
    for cls in config_classes():
        print(f"\n## `{cls.__name__}`\n\n| field | type | default | meaning |\n|---|---|---|---|")
        print("\n".join(table(cls)))
