"""Render a conversation as one text for a model to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.errors import UserError

CHAT_TEMPLATE = "chat_template.jinja"
# For a model that was not trained on conversations: plain turns, as printed in books and on the web.
PLAIN_TURNS = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")


def render(messages: Sequence[dict[str, str]], template: str | None) -> str:
    """Return the text of a conversation; if the assistant speaks next, it ends where the answer begins.

    Args:
        messages: each with ``role`` ("system", "user" or "assistant") and ``content``.
        template: a Jinja template in the format of ``transformers``, with ``messages`` and ``add_generation_prompt``,
            run in a sandbox; ``bos_token`` and ``eos_token`` are empty, because text cannot contain these tokens.
            None: plain turns, "User: …" and "Assistant: …", one per line; stop at ``PLAIN_STOPS``.

    Raises:
        UserError: the template is invalid or fails, or a message has no role or content.
    """
    for number, message in enumerate(messages):
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise UserError(f"message {number + 1} needs a role and a content, both strings")
    if not messages:
        raise UserError("a conversation needs at least one message")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(PLAIN_TURNS if template is None else template).render(
            messages=list(messages),
            add_generation_prompt=messages[-1]["role"] != "assistant",
            bos_token="",
            eos_token="",
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UserError(f"the chat template fails: {error}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_template(run_directory: Path) -> str | None:
    """Return the run's chat template, or None if it has none."""
    path = run_directory / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None
