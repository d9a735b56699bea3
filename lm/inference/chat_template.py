"""A conversation as one text for a model to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.errors import UserError

CHAT_TEMPLATE = "chat_template.jinja"
# For a model that was trained on no conversations: plain turns, as they are printed in books and on the web.
PLAIN_TURNS = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")


def render(messages: Sequence[dict[str, str]], template: str | None) -> str:
    """The text of a conversation; one that does not end with the assistant's words ends where they should begin.

    Args:
        messages: each with ``role`` ("system", "user" or "assistant") and ``content``.
        template: a Jinja template as ``transformers`` has them, over ``messages`` and ``add_generation_prompt``, run in
            a sandbox; ``bos_token`` and ``eos_token`` are empty in it, for no text can spell them. None: plain turns,
            "User: …" and "Assistant: …", a line each; stop at ``PLAIN_STOPS``.

    Raises:
        UserError: the template cannot be read or fails, or a message has no role or content.
    """
    for number, message in enumerate(messages):
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise UserError(f"message {number + 1} needs a role and a content, both texts")
    if not messages:
        raise UserError("a conversation needs a message")
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
    """The run's own chat template, if it has one."""
    path = run_directory / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None
