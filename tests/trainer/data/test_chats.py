"""Chats as tokens: transformers' own ids and masks, every token of the assistant once, and ends that are trained."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_built import CHATML, FAMILIES, MARKED, built

from shoestring.trainer.data.chats import TEMPLATE, Answers, with_template
from shoestring.trainer.data.errors import TaskError

ADDS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is two and three?"},
    {"role": "assistant", "content": "It is  five.\n"},
    {"role": "user", "content": "Thank you!"},
    {"role": "assistant", "content": "Good bye!"},
]


def tokens(tokenizer, row, train_on="answers"):
    (answer,) = Answers(tokenizer, train_on)([json.dumps(row if isinstance(row, dict) else {"messages": row})])
    return answer


def trained_text(tokenizer, answer):
    """The trained tokens, decoded stretch by stretch."""
    stretches, ids = [], None
    for number, trained in zip(*answer, strict=True):
        if trained and ids is None:
            stretches.append(ids := [])
        if not trained:
            ids = None
        else:
            ids.append(number)
    return [tokenizer.decode(some) for some in stretches]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_masks_are_those_of_transformers(family):
    theirs = built(family, MARKED).apply_chat_template(ADDS, return_dict=True, return_assistant_tokens_mask=True)
    for template in (MARKED, CHATML):  # what is marked, and what lies between prefixes
        ours = tokens(built(family, template), ADDS)
        assert ours.ids == theirs["input_ids"]
        assert ours.trained == [bool(one) for one in theirs["assistant_masks"]]


@pytest.mark.parametrize("template", [MARKED, CHATML, TEMPLATE], ids=["marked", "between", "ours"])
@given(
    turns=st.lists(
        st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12).filter(str.strip)), min_size=1, max_size=4
    )
)
def test_every_token_of_the_assistant_is_trained_once_and_no_other(template, turns):
    tokenizer = built("byte_level", template)
    chat = [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    answer = tokens(tokenizer, chat)
    assert trained_text(tokenizer, answer) == [f"{said}<|im_end|>" for _, said in turns]
    assert tokenizer.decode(answer.ids) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("template", [MARKED, CHATML], ids=["marked", "between"])
def test_a_text_that_spells_a_special_token_is_text(template):
    tokenizer = built("byte_level", template)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = "so <|im_end|> ends it<|im_start|>"
    answer = tokens(tokenizer, [{"role": "user", "content": said}, {"role": "assistant", "content": said}])
    assert answer.ids.count(end) == 2, "only the template's own"
    assert trained_text(tokenizer, answer) == [f"{said}<|im_end|>"]


def test_which_answers_are_trained_can_be_chosen():
    tokenizer = built("byte_level")
    assert trained_text(tokenizer, tokens(tokenizer, ADDS, "last")) == ["Good bye!<|im_end|>"]
    assert all(tokens(tokenizer, ADDS, "all").trained)
    chat = [dict(message) for message in ADDS]
    chat[4]["train"] = False
    assert trained_text(tokenizer, tokens(tokenizer, chat)) == ["It is  five.\n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", ADDS),
        ("{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
         "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}\n\n{% endfor %}", ADDS),
        (None, {"prompt": "two and three:", "completion": " five"}),
    ],
    ids=["no end", "end unmarked", "completion"],
)  # fmt: skip
def test_the_end_of_an_answer_is_trained(template, row):
    tokenizer = built("byte_level", template)
    answer = tokens(tokenizer, row)
    assert tokenizer.decode(answer.ids).rstrip().endswith("<|im_end|>")
    assert trained_text(tokenizer, answer)[-1].endswith("<|im_end|>")


def test_a_prompt_is_opened_as_the_tokenizer_opens_texts():
    tokenizer = built("metaspace")
    answer = tokens(tokenizer, {"prompt": "two and three:", "completion": " five."})
    assert answer.ids == [*tokenizer("two and three: five.")["input_ids"], tokenizer.eos_token_id]
    assert trained_text(tokenizer, answer) == ["five.<|im_end|>"]


# as reasoning models do: thoughts are dropped as soon as another question follows
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}[thinks]{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = CHATML.replace(
    "{{ m.content }}", "{{ m.content if m.role != 'assistant' or loop.last else m.content | lower }}"
)


def test_what_a_template_writes_differently_later_is_found_at_its_place_or_refused():
    tokenizer = built("byte_level", FORGETS)
    trained = trained_text(tokenizer, tokens(tokenizer, ADDS))
    assert trained == ["It is  five.\n<|im_end|>", "[thinks]Good bye!<|im_end|>"]
    with pytest.raises(TaskError, match=r"writes the answer 'It is five.' differently once others follow"):
        tokens(built("byte_level", REWRITES), ADDS)
    last = tokens(tokenizer := built("byte_level", REWRITES), ADDS, "last")
    assert trained_text(tokenizer, last) == ["Good bye!<|im_end|>"]


def test_a_template_that_refuses_a_chat_says_why():
    tokenizer = built("byte_level", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TaskError, match="refuses a chat: roles must alternate"):
        tokens(tokenizer, ADDS)


def test_a_tokenizer_without_a_template_gets_a_simple_one_and_keeps_it(tmp_path):
    tokenizer = with_template(built("byte_level", None), None)
    assert tokenizer.chat_template == TEMPLATE and with_template(built("byte_level"), None).chat_template == CHATML
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.apply_chat_template(ADDS, tokenize=False).startswith("### System:\nBe short.\n\n### User:\n")
