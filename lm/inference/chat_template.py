"""Turn a conversation into the tokens that a model reads: in training, in the terminal and on the server alike.

The chat template's own text is encoded with special tokens, what the messages say without them: a user who types
``<|user|>`` gets these characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import is_text
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import CHAT_TEMPLATE
from lm.config.settings import Config
from lm.inference.marked_text import MarkedText, marked_kind
from lm.inference.template_language import run_template

# For a model that was not trained on conversations: plain turns, as printed in books and on the web.
PLAIN_TURNS = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")
_END_OF_WORDS = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers; its space shows whether the template strips

Message = Mapping[str, str]
Span = tuple[int, int]  # start and stop, in characters


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation.

    Attributes:
        shielded: the text with U+FFFF for each character of a message that could be part of a special token.
        generated: what the template marks as the assistant's with ``{% generation %}``.
    """

    text: str
    shielded: str
    generated: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    """How a run's conversations are written.

    Args:
        template: a Jinja template in the format of ``transformers``; None: plain turns, "User: …" and "Assistant: …",
            one per line, to be stopped at ``stops``.
        tokenizer: the run's. Its tokens that begin and end texts are the template's ``bos_token`` and ``eos_token``.
        special: whether the template can write special tokens; False for a run that was trained without them.
    """

    template: str | None
    tokenizer: Tokenizer
    special: bool = True

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return PLAIN_STOPS if self.template is None else ()

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Special tokens that end an answer, besides those that end every text."""
        try:
            chat, spans = self.answers([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except UserError:  # the template wants other roles, or formats prompts differently when a response follows
            return ()
        end = self.end_of(chat, spans[-1]) if spans else None
        return () if end is None or end in self.tokenizer.end_ids else (end,)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, for the model to continue, without the one that starts every text.

        Each message has a ``role`` ("system", "user" or "assistant") and ``content``. If the last one is the
        assistant's, the tokens end in its words; otherwise the assistant speaks next.

        Raises:
            UserError: as ``render``.
        """
        (tokens,) = self.pieces_of(self.render(messages), ())
        return tokens

    def render(self, messages: Sequence[Message], *, complete: bool = False) -> RenderedChat:
        """Return the text that ``encode`` encodes; ``complete``: without the beginning of another answer.

        Raises:
            UserError: the template is invalid or fails, a message has no role or content, the template leaves out the
                message that is to be continued, or it transforms a message with characters of special tokens so that
                they can no longer be distinguished from its own.
        """
        text, generated = self._run(messages, str, complete=complete)
        if not self.special:
            return RenderedChat(text, "\uffff" * len(text), generated)
        try:
            marked, _ = self._run(messages, self._kind, complete=complete)
        except UserError:  # it takes plain text only
            marked = ""
        if self._kind.plain(marked) == text:
            return RenderedChat(text, self._kind.shielded(marked), generated)
        names = self.tokenizer.special_tokens
        signs = {each for name in names for each in ([c for c in name if not c.isalnum()] or name)}
        if any(signs.intersection(message["content"]) for message in messages):
            raise UserError(
                "a message contains characters of special tokens, and the chat template transforms it so that they can "
                "no longer be distinguished from the template's own"
            )
        return RenderedChat(text, text, generated)

    def pieces_of(self, chat: RenderedChat, cuts: Sequence[int]) -> list[list[int]]:
        """Return the tokens before, between and after the cuts, which ascend; no token extends over one.

        The first piece begins without the token that starts every text, even if the template writes it.
        """
        pieces = self.tokenizer.encode_shielded(chat.text, chat.shielded, cuts)
        if pieces[0][:1] == [self.tokenizer.begin_id]:
            del pieces[0][0]
        return pieces

    def answers(self, messages: Sequence[Message]) -> tuple[RenderedChat, list[Span]]:
        """Return a conversation that ends with the assistant, and where in its text the assistant's turns are.

        They are what the template marks with ``{% generation %}``, or else the text that each of the assistant's
        messages adds to the conversation before it, both without newlines at the end.

        Raises:
            UserError: as ``render``; or the template formats messages differently when others follow.
        """
        chat = self.render(messages, complete=True)
        spans = list(chat.generated) or [
            self._added(chat.text, messages[:number], message)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        stripped = [(start, start + len(chat.text[start:stop].rstrip("\n"))) for start, stop in spans]
        return chat, [(start, stop) for start, stop in stripped if start < stop]

    def end_of(self, chat: RenderedChat, span: Span) -> int | None:
        """Return the special token at the end of a turn of the assistant, or right after it, or None."""
        special = set(self.tokenizer.special_tokens.values())
        _, inside, after = self.pieces_of(chat, span)
        return next((token for token in (*inside[-1:], *after[:1]) if token in special), None)

    @cached_property
    def writes_special_tokens(self) -> bool:
        """Whether some conversation is read otherwise than without special tokens."""
        user, answer, system = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))
        plainly = replace(self, special=False)
        for messages in ([user, answer, user], [system, user, answer]):
            with suppress(UserError):  # not every template takes a system message
                if self.encode(messages) != plainly.encode(messages):
                    return True
        return False

    def _added(self, text: str, earlier: Sequence[Message], message: Message) -> Span:
        """Where in ``text`` a message of the assistant is that follows the earlier ones."""
        before, _ = self._run(earlier, str, prompt=True)
        until, _ = self._run([*earlier, message], str, complete=True)
        if until.startswith(before) and text.startswith(until.rstrip("\n")):
            return len(before), len(until)
        raise UserError(
            "the chat template formats the prompt differently when a response follows: the prompt and the words before "
            "the response must be the same in both cases, or {% generation %} must mark the responses"
        )

    @cached_property
    def _variables(self) -> dict[str, str]:
        known = self.tokenizer.named_tokens
        return known if self.special else dict.fromkeys(known, "")

    @cached_property
    def _kind(self) -> type[MarkedText]:
        """Text that marks every character of special tokens but white space, which templates strip."""
        return marked_kind(
            "".join(sorted(set("".join("".join(n.split()) or n for n in self.tokenizer.special_tokens))))
        )

    def _run(
        self, messages: Sequence[Message], kind: type[str], *, complete: bool = False, prompt: bool | None = None
    ) -> tuple[str, tuple[Span, ...]]:
        return _run(messages, self.template, self._variables, kind, complete=complete, prompt=prompt)


def render(messages: Sequence[Message], template: str | None) -> str:
    """Return the text of a conversation, without any special tokens, for the model to continue.

    Args:
        messages: as of ``ChatFormat.encode``.
        template: as in ``ChatFormat``.

    Raises:
        UserError: the template is invalid or fails, a message has no role or content, or the template leaves out the
            message that is to be continued.
    """
    return _run(messages, template, {"bos_token": "", "eos_token": ""}, str)[0]


def chat_format(run_directory: Path, tokenizer: Tokenizer, config: Config) -> ChatFormat:
    """Return the format of a run's conversations."""
    special = config.finetune.task != "instruction" or config.finetune.template_tokens == "special"
    return ChatFormat(read_template(run_directory), tokenizer, special)


def read_template(run_directory: Path) -> str | None:
    """Return the run's chat template, or None if it has none. UserError if it cannot be read."""
    path = run_directory / CHAT_TEMPLATE
    return load_template(path) if path.is_file() else None


def load_template(path: str | Path) -> str:
    """Read a chat template from a file, without a byte order mark. UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template {path} cannot be read: {error}") from None


def _run(
    messages: Sequence[Message],
    template: str | None,
    variables: Mapping[str, str],
    kind: type[str],
    *,
    complete: bool = False,
    prompt: bool | None = None,
) -> tuple[str, tuple[Span, ...]]:
    """Return the text of a conversation, and what the template marks as generated.

    The contents of messages are strings of this kind. ``prompt`` None: the assistant speaks next unless it spoke last.
    """
    _check(messages)
    if not messages and prompt is None:
        raise UserError("a conversation needs at least one message")
    of_assistant = bool(messages) and messages[-1]["role"] == "assistant"
    mark = kind.marked if issubclass(kind, MarkedText) else kind
    given = [dict(message) | {"content": mark(message["content"])} for message in messages]
    if continued := of_assistant and not complete:
        given[-1]["content"] = mark(messages[-1]["content"] + _END_OF_WORDS)
    values: dict[str, Any] = {"messages": given, "tools": None, "documents": None, **variables}
    values["add_generation_prompt"] = not (of_assistant or complete) if prompt is None else prompt
    text, generated = run_template(PLAIN_TURNS if template is None else template, kind, values)
    return _until_words_end(kind(text), messages[-1]["content"]) if continued else text, generated


def _until_words_end(text: str, words: str) -> str:
    """Return the text until ``_END_OF_WORDS``, which follows the last message's words."""
    at = text.rfind(_END_OF_WORDS.strip())
    if at < 0 or words.strip() not in text:
        raise UserError("the chat template leaves out the assistant's last message, so it cannot be continued")
    return text[:at] if text[at:].startswith(_END_OF_WORDS) else text[:at].rstrip()


def _check(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise UserError(f"message {number + 1} needs a role and a content, both strings")
        if not is_text("".join(message.values())):
            raise UserError(f"message {number + 1} contains half of a surrogate pair, which is not a character")
