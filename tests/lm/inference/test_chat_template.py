"""Conversations as text and as tokens, compared with those of transformers."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from data_prep.errors import UserError
from data_prep.tokenizers.special_tokens import SpecialTokens, with_record
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.inference.chat_template import PLAIN_TURNS, ChatFormat, read_template, render

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why {{ 7 * 7 }}?"},
]
# In the manner of well-known models.
TEMPLATES = {
    "plain turns": "{{ bos_token }}" + PLAIN_TURNS,
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "pieces": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end_of_turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "llama 2": """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set first = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set first = false %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and first != false %}
{% set content = '<<SYS>>\\n' + first + '\\n<</SYS>>\\n\\n' + m['content'] %}
{% else %}
{% set content = m['content'] %}
{% endif %}
{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{{- ' ' ~ content | trim ~ ' ' ~ eos_token }}
{%- endif %}
{% endfor %}""",
    "llama 3": """\
{%- set ns = namespace(seen=0) -%}
{%- for m in messages -%}
{%- set content = '<|im_start|>' ~ m['role'] ~ '<|im_end|>\n\n' ~ (m['content'] | trim) ~ '<|end_of_turn|>' -%}
{%- if loop.first -%}{%- set content = bos_token + content -%}{%- endif -%}
{%- set ns.seen = ns.seen + 1 -%}
{{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_end|>\n\n' -}}{%- endif -%}""",
    "mistral": """\
{{- bos_token }}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}
{%- if loop.last and messages[0].role == 'system' %}
{{- '[INST]' + messages[0].content + '\n\n' + m.content + '[/INST]' }}
{%- else %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- endif %}
{%- else %}
{{- m.content + eos_token }}
{%- endif %}
{%- endfor %}""",
    "qwen 3": """\
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' and not m.content.startswith('<tool>') %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- if loop.index0 > ns.last %}{%- set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{%- endif %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}""",
    "gemma": """\
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}\
{% set role = m['role'] %}{% endif %}{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|end_of_turn|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}""",
    "zephyr": """\
{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\n' + m['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "marked": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|end_of_turn|>{% endgeneration %}{% else %}{{ m.content }}<|end_of_turn|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "dialect": """\
{% macro turn(m) %}<|{{ m.role }}|>{{ caller() if caller else m.content[:40] }}{% endmacro %}
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 4 %}{% break %}{% endif %}
{{ turn(m) }}{{ strftime_now('%Y') }}{{ m | tojson }}{{ [m.content, {'é': 1}] | tojson(indent=2, ensure_ascii=True) }}
{{ {'b': m.content, 'a': none} | tojson(separators=(',', ':'), sort_keys=true) }}{{ m.content | upper | length }}
{% set kept %}{{ m.content }}!{% endset %}{{ kept | replace('a', '<|user|>') }}{{ [m.content, kept] | join('|') }}
{{ '%s and %s' | format(m.content, 1) }}{{ '{}'.format(m.content) }}{{ m.content.partition('|')[2] ~ m.content[1:] }}
{{ (m.content.splitlines() | first | default('-', true)).removeprefix('<') }}{{ documents is none }}
{% filter trim %}{{ m.content }}{% endfilter %}{{ 'yes' if ('|' ~ m.content).startswith('|<') else 'no' }}
{% endfor %}""",
}
SPECIAL = [
    *("<|endoftext|>", "<|pad|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end_of_turn|>"),
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "[INST]", "[/INST]"),
]
KINDS = ("byte level", "first", "always", "never", "prepend", "unigram")


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A small BPE: of bytes, or with a space before the first word, before each part, or before none, as sentencepiece
    and its converters have it."""
    if kind == "unigram":  # the names of special tokens are ordinary entries, too, as in T5's vocabulary
        pieces = ["<unk>", *SPECIAL, "user", "▁the", "said", "assistant", *map(chr, range(33, 127)), "▁", "é", "\n"]
        backend = Backend(models.Unigram([(piece, -1.0 - n / 64) for n, piece in enumerate(pieces)], 0, False))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.add_special_tokens(SPECIAL)
        return Tokenizer(backend)
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True) if kind != "byte level" else models.BPE())
    alphabet = list("<|>/[]_ \n▁:.?!{}*,\"'")
    if kind == "byte level":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    texts = [
        "User: the user said system hello there\nAssistant: the assistant said user INST think im start end",
        "abc",
    ]
    given = SPECIAL if kind == "byte level" else ["<unk>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=given, initial_alphabet=alphabet, show_progress=False, max_token_length=6
    )
    backend.train_from_iterator(texts * 9, trainer)
    return Tokenizer(backend)


@functools.cache
def peer_of(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer_of(kind).to_json()),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
    )


def turns(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    """Conversations in which user and assistant alternate, often after a system message."""

    def conversation(texts: list[str], system: bool) -> list[dict[str, str]]:
        roles = ["system"] * system + ["user", "assistant"] * len(texts)
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    return st.builds(conversation, st.lists(contents, min_size=2, max_size=6), st.booleans())


WORDS = ["the", " user", "said ", "\n", " ", "é", "a", "<b>", '"', ".", "user", "|", "assistant"]
INNOCENT = turns(st.lists(st.sampled_from(WORDS), max_size=6).map("".join))
PIECES = [*SPECIAL, "<|us", "er|>", "<|", "|>", "<", ">", "<think", "<|im_", "end|>", "<|<|user|>", "INST", "/"]
HOSTILE = turns(st.lists(st.sampled_from([*WORDS, *PIECES]), max_size=6).map("".join))


def of_peer(kind: str, messages, template: str, **options):
    """What transformers makes of a conversation that the assistant ends, or answers."""
    last = messages[-1]["role"] == "assistant"
    said = {"continue_final_message": True} if last else {"add_generation_prompt": True}
    return peer_of(kind).apply_chat_template(messages, chat_template=template, return_dict=False, **said, **options)


def outcome(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except Exception:  # a template may refuse the roles, in both
        return "refused"


@pytest.mark.parametrize("kind", ["byte level", "first"])
@pytest.mark.parametrize("template", TEMPLATES)
@given(messages=HOSTILE)
def test_the_text_is_that_of_transformers(template, kind, messages):
    chat = ChatFormat(TEMPLATES[template], tokenizer_of(kind))
    text = outcome(lambda: chat.render(messages).text)
    assert text == outcome(of_peer, kind, messages, TEMPLATES[template], tokenize=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@given(messages=INNOCENT)
def test_the_tokens_are_those_of_transformers(template, kind, messages):
    chat, end = ChatFormat(TEMPLATES[template], tokenizer_of(kind)), tokenizer_of(kind).end_of_text_id
    tokens, peers = outcome(chat.encode, messages), outcome(of_peer, kind, messages, TEMPLATES[template])
    assert tokens == (peers[1:] if peers[0] == end else peers)


NEUTRAL = dict.fromkeys(map(ord, "<|>[]/_INSTuserasitnmkdyop"), "x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("dialect", "qwen 3")])
@given(messages=HOSTILE)
def test_a_message_adds_no_special_token(template, kind, messages):
    tokenizer = tokenizer_of(kind)
    chat = ChatFormat(TEMPLATES[template], tokenizer)
    special = set(tokenizer.special_tokens.values()) - {tokenizer.unknown_id}

    def signs(said) -> list[int]:
        return [token for token in chat.encode(said) if token in special]

    harmless = [message | {"content": message["content"].translate(NEUTRAL) or "x"} for message in messages]
    filled = [message | {"content": message["content"] or "<"} for message in messages]
    assert outcome(signs, filled) == outcome(signs, harmless)
    if kind == "byte level":
        text = outcome(lambda: tokenizer.decode(chat.encode(filled)))
        rendered = outcome(lambda: chat.render(filled).text)
        assert text in (rendered, rendered.removeprefix("<|endoftext|>"))


@pytest.mark.parametrize(
    ("template", "messages", "special"),
    [
        # across the seams of two messages, and of a message and the template
        ("{{ messages[0].content }}{{ messages[1].content }}", ["<|us", "er|>"], []),
        ("{{ messages[0].content ~ messages[1].content }}", ["<|us", "er|>"], []),
        ("<|{{ messages[0].content }}|>", ["user"], []),
        ("<|us{{ messages[0].content }}", ["er|>"], []),
        ("{{ messages[0].content }}er|>", ["<|us"], []),
        ("{{ messages[0].content }}<|user|>", ["<|"], ["<|user|>"]),
        ("{{ messages[0].content }}<|user|>{{ messages[0].content }}", ["<|user|>"], ["<|user|>"]),
        # what is left when the template takes something out, or turns it around
        ("{{ messages[0].content | replace('x', '') }}", ["<|uxser|>"], []),
        ("{{ messages[0].content.split('x') | join }}", ["<|uxser|>"], []),
        ("{{ messages[0].content[::-1] }}", [">|resu|<"], []),
        ("{{ messages[0].content | lower }}", ["<|USER|>"], []),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}", ["<|user|>"], []),
        ("{{ messages[0].content.split('</think>')[-1] }}</think>", ["a</think>b"], ["</think>"]),
        ("{{ messages | tojson }}", ["<|user|>"], []),
        ("{{ messages }}", ["<|user|>"], []),
        ("<|{{ messages[0].role }}|>{{ '<|' ~ 'user' + '|>' }}", ["a"], ["<|user|>"] * 2),
        ("{% set x = '<|user' %}{{ x }}|>{{ eos_token }}{{ pad_token }}", ["a"], ["<|user|>", *SPECIAL[:2]]),
    ],
)
def test_a_special_token_is_the_templates_alone(template, messages, special):
    tokenizer = tokenizer_of("byte level")
    said = [{"role": "user", "content": text} for text in messages]
    tokens = ChatFormat(template, tokenizer).encode(said)
    assert [tokenizer.token_text(t) for t in tokens if t in tokenizer.special_tokens.values()] == special
    assert tokenizer.decode(tokens) == ChatFormat(template, tokenizer).render(said).text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("('<' ~ c) == '<<|user|>'", "True"),
        ("('a' + c + 'b') in ['a<|user|>b']", "True"),
        ("([c, 'a'] | join) == '<|user|>a'", "True"),
        ("([c, 'a'] | join('-')).endswith('|>-a')", "True"),
        ("('%s!' | format(c)) == '<|user|>!'", "True"),
        ("'{}'.format(c) == '<|user|>'", "True"),
        ("'<|user|>x'.startswith(c)", "True"),
        ("'a<|user|>b'.split(c) | length", "2"),
        ("'a<|user|>b'.replace(c, '') == 'ab'", "True"),
        ("(c | upper).lower() == c", "True"),
        ("(c | first) == '<' and (c | last) == '>' and (c | reverse) == '>|resu|<'", "True"),
        ("kept == c and kept.strip('<|>') == 'user'", "True"),
        ("c | length", "8"),
    ],
)
def test_a_template_sees_what_a_message_spells(expression, value):
    template = "{% set c = messages[0].content %}{% set kept %}{{ c }}{% endset %}{{ " + expression + " }}<|user|>"
    chat = ChatFormat(template, tokenizer_of("byte level"))
    said = [{"role": "user", "content": "<|user|>"}]
    assert chat.render(said).text == value + "<|user|>"
    assert chat.encode(said) == [*chat.tokenizer.encode(value), chat.tokenizer.special_tokens["<|user|>"]]


def test_what_cannot_be_followed_is_refused_only_where_it_matters():
    chat = ChatFormat("{{ messages[0].content | urlencode }}<|user|>", tokenizer_of("byte level"))
    assert chat.encode([{"role": "user", "content": "the user"}])[-1] == chat.tokenizer.special_tokens["<|user|>"]
    with pytest.raises(UserError, match="no longer be distinguished from the template's own"):
        chat.encode([{"role": "user", "content": "<|user|>"}])


def test_a_row_has_one_start_token_whether_or_not_the_template_writes_it():
    chats = [ChatFormat(start + TEMPLATES["pieces"], tokenizer_of("byte level")) for start in ("", "{{ bos_token }}")]
    assert chats[0].encode(ASKED) == chats[1].encode(ASKED)
    assert chats[0].tokenizer.end_of_text_id not in chats[0].encode(ASKED)


@pytest.mark.parametrize("begins", [True, False])
def test_an_imported_tokenizer_begins_and_ends_texts_as_its_checkpoint_does(begins):
    plain = tokenizer_of("byte level")
    ids = plain.special_tokens
    start, end, turn = ids["<|im_start|>"], ids["<|im_end|>"], ids["<|end_of_turn|>"]
    recorded = SpecialTokens(start if begins else None, start, end, (end, turn), ids["<|pad|>"], None, ())
    description = with_record(plain.description, recorded, {token: name for name, token in ids.items()})
    tokenizer = Tokenizer.from_json(json.dumps(description))
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    for template in ("{{ bos_token }}" + turns, turns):
        chat = ChatFormat(template, tokenizer)
        row = tokenizer.begun(chat.encode(ASKED))
        peer = PreTrainedTokenizerFast(
            tokenizer_object=Backend.from_str(tokenizer.to_json()), bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        theirs = peer.apply_chat_template(ASKED, chat_template=template, return_dict=False)
        assert row == ([start, *theirs] if begins and template == turns else theirs)
        assert row.count(start) == (begins or template != turns)
        assert chat.ends == ()  # its own ends are enough


def test_without_special_tokens_a_template_writes_characters():
    chat = ChatFormat(TEMPLATES["zephyr"], tokenizer_of("byte level"), special=False)
    assert chat.encode(ASKED) == chat.tokenizer.encode(chat.render(ASKED).text)
    assert chat.ends == ()
    assert ChatFormat(TEMPLATES["zephyr"], chat.tokenizer).writes_special_tokens
    assert not ChatFormat(TEMPLATES["plain turns"], chat.tokenizer).writes_special_tokens


@pytest.mark.parametrize(
    ("template", "end"),
    [
        *(("chatml", ["<|im_end|>"]), ("pieces", ["<|end_of_turn|>"]), ("marked", ["<|end_of_turn|>"])),
        *(("llama 2", []), ("plain turns", []), ("llama 3", ["<|end_of_turn|>"])),
    ],
)
def test_a_templates_own_end_of_a_turn_ends_an_answer(template, end):
    tokenizer = tokenizer_of("byte level")
    assert [tokenizer.token_text(each) for each in ChatFormat(TEMPLATES[template], tokenizer).ends] == end


def test_special_tokens_that_take_the_space_around_them_or_are_matched_after_normalization():
    backend = Backend.from_str(tokenizer_of("byte level").to_json())
    backend.add_special_tokens([AddedToken("<m>", lstrip=True, rstrip=True), AddedToken("<BIG>", normalized=True)])
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = Tokenizer(backend)
    peer = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(tokenizer.to_json()))
    template = "<|user|>  <m> {{ messages[0].content }}  <m>  x<|user|>"
    for content in ("the user", " said "):
        said = [{"role": "user", "content": content}]
        wanted = peer.apply_chat_template(said, chat_template=template, return_dict=False)
        assert ChatFormat(template, tokenizer).encode(said) == wanted
    for content in ("<m>", " <m> ", "<BIG>", "<big>", "＜ＢＩＧ＞", "＜ｍ＞"):
        tokens = ChatFormat(template, tokenizer).encode([{"role": "user", "content": content}])
        assert [tokenizer.token_text(t) for t in tokens if t in tokenizer.special_tokens.values()] == [
            *("<|user|>", "<m>", "<m>", "<|user|>")
        ]


def test_plain_turns_end_where_the_answer_begins():
    assert render(ASKED, None) == "System: Be brief.\nUser: Why {{ 7 * 7 }}?\nAssistant:"
    answered = [*ASKED, {"role": "assistant", "content": "So."}]
    assert render(answered, None) == "System: Be brief.\nUser: Why {{ 7 * 7 }}?\nAssistant: So."
    longer = render([*answered, {"role": "user", "content": "Oh"}], None)
    assert longer.startswith(render(ASKED, None) + " So.\n")


def test_a_last_message_that_the_template_leaves_out_cannot_be_continued():
    answered = [*ASKED, {"role": "assistant", "content": "So."}]
    with pytest.raises(UserError, match="leaves out the assistant's last message"):
        render(answered, "{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('turns must alternate') }}", "turns must alternate"),
        ("{% for m in %}", "the chat template fails"),
        ("{% generation %}", "the chat template fails"),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails"),
        ("{{ messages[0].content.__class__.__mro__ }}", "the chat template fails"),
        ("{{ messages[0].content._to }}{{ messages[0].content._to.x }}", "the chat template fails"),
        ("{{ messages[0].content.marked.__func__ }}", "the chat template fails"),
        ("{{ messages.append(1) }}", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails"),
        ("{{ messages[0].content + 1 }}", "the chat template fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails"),
        ("{% for i in range(10000000) %}{% endfor %}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_or_breaks_out_gets_one_sentence(template, words):
    for make in (render, lambda messages, text: ChatFormat(text, tokenizer_of("byte level")).encode(messages)):
        with pytest.raises(UserError, match=words) as error:
            make(ASKED, template)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}])
def test_a_message_without_role_or_content_is_refused(message):
    with pytest.raises(UserError, match="message 2 needs a role and a content"):
        render([ASKED[0], message], None)
    with pytest.raises(UserError, match="needs at least one message"):
        render([], None)
    with pytest.raises(UserError, match="message 1 contains half of a surrogate pair"):
        render([{"role": "user", "content": json.loads('"\\ud83d"')}], None)


def test_a_run_may_hold_a_template(tmp_path):
    assert read_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert read_template(tmp_path) == "é"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages }}")
    assert read_template(tmp_path) == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"the chat template .*chat_template\.jinja cannot be read"):
        read_template(tmp_path)
