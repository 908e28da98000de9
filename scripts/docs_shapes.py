"""griffe extension: what signatures say in comments becomes part of the documentation.

The package writes shapes where they are read, beside the arguments::

    def rope_3d(
        x: Tensor,  # [B, L, H, D]
        ...
    ) -> Tensor:  # [B, L, H, D]

A parser of syntax drops such comments; this puts them before the descriptions of the arguments. It also takes entries
for several arguments ("q, k, v: ..."), refuses entries for arguments that do not exist, and marks shapes as code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from griffe import (
    Attribute,
    Class,
    Docstring,
    DocstringParameter,
    DocstringReturn,
    DocstringSection,
    DocstringSectionAttributes,
    DocstringSectionParameters,
    DocstringSectionRaises,
    DocstringSectionReturns,
    DocstringSectionText,
    Extension,
    Function,
    GriffeLoader,
    Parameter,
)

Argument = Parameter | Attribute

# "q, k, v" is no argument's name: that is checked here.
OPTIONS = {
    "returns_multiple_items": False,
    "returns_named_value": False,
    "warn_missing_types": False,
    "warn_unknown_params": False,
}
ARGUMENT = re.compile(r"^\s+(\w+): .*  # (.+)$")
FIELD = re.compile(r"^    (\w+): .*  # (.+)$")
RESULT = re.compile(r"^\s*(?:def .*)?\) -> .*:  # (.+)$")
SHAPE = re.compile(r"(?<![\w`\]])\[[A-Z0-9][^\[\]`]*\](?![(\[`])")


class Shapes(Extension):
    def on_function(self, *, func: Function, loader: GriffeLoader, **_: object) -> None:
        if func.docstring is None or func.name.startswith("_"):
            return
        signature = func.lines[: (func.docstring.lineno or 0) - (func.lineno or 0)]
        comments = {match[1]: match[2] for line in signature if (match := ARGUMENT.match(line))}
        arguments = {parameter.name: parameter for parameter in func.parameters}
        sections = parse(func.docstring, arguments, comments)
        returns = [section for section in sections if isinstance(section, DocstringSectionReturns)]
        for entry in (entry for section in returns for entry in section.value):
            if entry.annotation is not func.returns:  # the text before a colon was taken for a type
                entry.description = marked(f"{entry.annotation}: {entry.description}")
                entry.annotation = func.returns
        result = next((match[1] for line in signature if (match := RESULT.match(line))), None)
        if result is not None and not returns:
            returned = DocstringReturn("", annotation=func.returns, description=marked(result))
            insert(sections, DocstringSectionReturns([returned]))

    def on_class(self, *, cls: Class, loader: GriffeLoader, **_: object) -> None:
        if cls.docstring is None:
            return
        # The arguments of a dataclass are its fields.
        arguments = {parameter.name: parameter for parameter in cls.parameters} or cls.attributes
        fields = {match[1]: match[2] for line in cls.lines if (match := FIELD.match(line))}
        parse(cls.docstring, arguments, {name: comment for name, comment in fields.items() if name in arguments})

    def on_attribute(self, *, attr: Attribute, loader: GriffeLoader, **_: object) -> None:
        if attr.docstring is not None:
            parse(attr.docstring, {}, {})


def parse(
    docstring: Docstring, arguments: Mapping[str, Argument], comments: Mapping[str, str]
) -> list[DocstringSection]:
    """The sections of a docstring, which it keeps for those who render it."""
    docstring.parser, docstring.parser_options = "google", OPTIONS
    sections = docstring.parsed
    described: set[str] = set()
    for section in sections:
        if isinstance(section, DocstringSectionText):
            section.value = marked(section.value)
            continue
        for entry in section.value:
            entry.description = marked(entry.description)
        if isinstance(section, DocstringSectionAttributes):
            for entry in section.value:
                if entry.name.endswith(","):  # "a, b: ...", of which all but the first word was taken for a type
                    entry.name, entry.annotation = f"{entry.name} {entry.annotation}", None
        if isinstance(section, DocstringSectionRaises):
            for entry in section.value:
                entry.annotation = str(entry.annotation).strip("()")  # two errors with one cause are no tuple
        if isinstance(section, DocstringSectionParameters):
            for entry in section.value:
                described |= describe(entry, arguments, comments)
    rest = [
        DocstringParameter(name, annotation=arguments[name].annotation, description=marked(comment))
        for name, comment in comments.items()
        if name not in described
    ]
    existing = next((section for section in sections if isinstance(section, DocstringSectionParameters)), None)
    if existing is not None:
        existing.value.extend(rest)
    elif rest:
        insert(sections, DocstringSectionParameters(rest))
    return sections


def describe(entry: DocstringParameter, arguments: Mapping[str, Argument], comments: Mapping[str, str]) -> set[str]:
    """Gives an entry the annotation and the comments of its arguments; their names."""
    names = entry.name.split(", ")
    unknown = set(names) - arguments.keys()
    if unknown:
        raise ValueError(f"a docstring describes {unknown}, but the arguments are {list(arguments)}")
    annotations = [arguments[name].annotation for name in names]
    entry.annotation = annotations[0] if len(set(map(str, annotations))) == 1 else None
    by_comment: dict[str, list[str]] = {}
    for name in names:
        if name in comments:
            by_comment.setdefault(comments[name], []).append(name)
    for_all = list(by_comment.values()) == [names]
    stated = [
        marked(comment) if for_all else f"{', '.join(of)} {marked(comment)}" for comment, of in by_comment.items()
    ]
    entry.description = "; ".join([*stated, entry.description])
    return set(names)


def marked(text: str) -> str:
    """Text with its shapes as code."""
    return SHAPE.sub(lambda shape: f"`{shape[0]}`", text)


def insert(sections: list[DocstringSection], section: DocstringSection) -> None:
    """Before the errors, else after the first text."""
    raises = (index for index, other in enumerate(sections) if isinstance(other, DocstringSectionRaises))
    texts = (index + 1 for index, other in enumerate(sections) if isinstance(other, DocstringSectionText))
    sections.insert(next(raises, next(texts, 0)), section)
