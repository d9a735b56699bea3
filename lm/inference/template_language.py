"""The Jinja dialect of ``transformers``' chat templates: its tags, filters, functions and treatment of whitespace."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.errors import UserError
from lm.inference.marked_text import MarkedText

GENERATED = "generated text"  # with a space, so that no template can name it


def run_template(template: str, kind: type[str], values: dict[str, Any]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the text that a template makes of ``values``, in a sandbox.

    The strings in ``values`` that are not the template's are of this kind: ``str`` or a kind of ``MarkedText``. The
    second result has the start and stop, in characters, of each block within ``{% generation %}``.

    Raises:
        UserError: the template is invalid or fails.
    """
    parts: list[str] = []
    generated: list[tuple[int, int]] = []
    try:
        for part in _compiled(template, kind).generate({**values, GENERATED: (parts, generated)}):
            parts.append(part)
    except (
        *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
        *(RecursionError, MemoryError),
    ) as error:
        raise UserError(f"the chat template fails: {error}") from None
    return "".join(parts), tuple(generated)


@functools.lru_cache(maxsize=64)
def _compiled(template: str, kind: type[str]) -> jinja2.Template:
    environment = _Environment(
        kind, trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters = {name: _returning(kind, each) for name, each in environment.filters.items()}
    environment.filters["tojson"] = functools.partial(_to_json, kind)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def _returning(kind: type[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result, if it is a plain string, is of this kind."""

    @functools.wraps(function)
    def filtered(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        return kind(result) if type(result) is str else result

    return filtered


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    kind: type[str],
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without escaped HTML, unlike Jinja's filter; if it holds a message, all of it is the message's."""
    plain = kind.plain(value) if issubclass(kind, MarkedText) else value
    text = json.dumps(plain, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return kind.marked(text) if issubclass(kind, MarkedText) and _holds_message(value) else text


def _holds_message(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_message, (*value, *value.values())))
    return any(map(_holds_message, value)) if isinstance(value, (list, tuple)) else isinstance(value, MarkedText)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Lets ``~`` join strings as the environment does."""

    def visit_Concat(self, node: nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        self.write("environment.concat(map(str, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    """Strings that are joined, and those that have a method called, become strings of this kind."""

    code_generator_class = _CodeGenerator

    def __init__(self, kind: type[str], **options: Any) -> None:
        super().__init__(**options)
        self.kind = kind
        self.concat = lambda parts: kind("".join(parts))  # type: ignore[method-assign]

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(self.kind(obj) if type(obj) is str else obj, attribute)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_noted", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _noted(self, context: Context, caller: Macro) -> str:
        said = str(caller())
        parts, generated = context[GENERATED]
        start = sum(map(len, parts))
        generated.append((start, start + len(said)))
        return said
