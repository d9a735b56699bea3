from __future__ import annotations

import pytest

from data_prep.errors import UserError
from lm.inference.chat_template import read_template, render

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why {{ 7 * 7 }}?"},
]


def test_plain_turns_end_where_the_answer_begins():
    assert render(ASKED, None) == "System: Be brief.\nUser: Why {{ 7 * 7 }}?\nAssistant:"
    answered = [*ASKED, {"role": "assistant", "content": "So."}]
    assert render(answered, None) == "System: Be brief.\nUser: Why {{ 7 * 7 }}?\nAssistant: So."
    longer = render([*answered, {"role": "user", "content": "Oh"}], None)
    assert longer.startswith(render(ASKED, None) + " So.\n")


def test_a_template_as_transformers_has_them():
    template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
        "{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    wanted = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render([{"role": "user", "content": " hi "}], template) == wanted


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('turns must alternate') }}", "turns must alternate"),
        ("{% for m in %}", "the chat template fails"),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails"),
        ("{{ messages.append(1) }}", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails"),
        ("{{ messages[0].content + 1 }}", "the chat template fails"),
        ("{% for i in range(10000000) %}{% endfor %}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_or_breaks_out_gets_one_sentence(template, words):
    with pytest.raises(UserError, match=words) as error:
        render(ASKED, template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}])
def test_a_message_without_role_or_content_is_told(message):
    with pytest.raises(UserError, match="message 2 needs a role and a content"):
        render([ASKED[0], message], None)
    with pytest.raises(UserError, match="needs at least one message"):
        render([], None)


def test_a_run_may_hold_a_template(tmp_path):
    assert read_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert read_template(tmp_path) == "é"
