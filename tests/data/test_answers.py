"""Where the answers of chats are, in the templates of real models. The judge is TRL's twin of each template, in which
`{% generation %}` marks what the model writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl
from chat_tokenizers import make

from reparam.data.batches import IGNORED
from reparam.data.chat import ChatTemplate
from reparam.data.encode import encode
from reparam.data.row import Row

FOLDER = Path(trl.__file__).with_name("chat_templates")
TWINS = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
TOKENS = re.compile(r"<[|｜]?[a-z_▁]+[|｜]?>|<\|[A-Z_]+\|>|</s>", re.IGNORECASE)
# The template renders a second header after the response of a tool, where generation has none.
ODD = {("diffusion_gemma", "call"), ("diffusion_gemma", "two calls"), ("diffusion_gemma", "content and call")}
# Tags that are plain text, so that they end no turn.
TAGS = {"<think>", "<tools>", "<tool_call>", "<tool_response>", "<function>", "<parameter>"}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, **others) -> dict:
    return {"role": "assistant", "content": content, **others}


def call(**arguments) -> dict:
    return {"type": "function", "id": "c1", "function": {"name": "add", "arguments": arguments}}


def result(content: str) -> dict:
    return {"role": "tool", "name": "add", "content": content, "tool_call_id": "c1"}


NUMBER = {"type": "integer", "description": "a number"}
PARAMETERS = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": PARAMETERS}}]

CHATS = {
    "one answer": [user("hi"), answer("hello")],
    "three answers": [user("hi"), answer("hello"), user("and"), answer("bye"), user("x"), answer("y z")],
    "system": [{"role": "system", "content": "be kind"}, user("hi"), answer("hello"), user("and"), answer("bye")],
    "reasoning": [user("2+2?"), answer("4", reasoning_content="2+2 is 4")],
    "reasoning twice": [
        user("2+2?"),
        answer("4", reasoning_content="2+2 is 4"),
        user("3+3?"),
        answer("6", reasoning_content="3+3 is 6"),
    ],
    "call": [user("2+2?"), answer("", tool_calls=[call(a=2, b=2)]), result("4"), answer("It is 4")],
    "content and call": [user("2+2?"), answer("I add", tool_calls=[call(a=2, b=2)]), result("4"), answer("4")],
    "two calls": [
        user("2+2? 3+4?"),
        answer("", tool_calls=[call(a=2, b=2), call(a=3, b=4)]),
        result("4"),
        result("7"),
        answer("4 and 7"),
    ],
    "answer that stands in the question": [user("say a"), answer("a"), user("a"), answer("a")],
}


def template(name: str) -> ChatTemplate:
    source = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = make(source)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(TOKENS.findall(source)) - TAGS)})
    return ChatTemplate(tokenizer)


def marked_by_twin(name: str, messages: list[dict], variables: dict) -> list[str]:
    """What the twin marks in each answer, in the chat that ends with it."""
    render = template(f"{name}_training")._renderer(variables)
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            earlier = len(render(messages[:i])[1])
            text, marks = render(messages[: i + 1])
            found.append("".join(text[start:end] for start, end in marks[earlier:]))
    return found


@pytest.mark.parametrize("name", TWINS)
def test_answers_are_what_the_twin_marks(name):
    for kind, messages in CHATS.items():
        variables = {"tools": TOOLS} if any("tool_calls" in message for message in messages) else {}
        try:
            parts = template(name).render(messages, loss_on="answers", variables=variables)
        except ValueError:
            continue  # a role or a tool call that the template refuses or leaves out
        if (name, kind) in ODD:
            continue
        found = [part.text[start:end] for part in parts for start, end in part.spans]
        expected = marked_by_twin(name, messages, variables)
        assert len(found) == len(expected)
        prompts = "".join(part.text[:start] for part in parts for start, _ in part.spans)
        for ours, twins in zip(found, expected, strict=True):
            # The twin may also mark the generation prompt, and what stands after the token that ends the answer.
            kept = twins.replace("<|return|>", "<|end|>") if "<|end|>" in ours[-7:] else twins
            assert ours.strip() in kept, (kind, ours, twins)
            before, after = kept.rsplit(ours.strip(), 1)
            assert not after.replace("<|end|>", "").strip(), (kind, ours, twins)
            assert before.strip() in prompts, (kind, ours, twins)


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "lfm2_2_5", "glm4moe"])
def test_reasoning_that_is_dropped_later_is_learned_where_it_is_generated(name):
    parts = template(name).render(CHATS["reasoning twice"], loss_on="answers")
    assert len(parts) == 2
    for part, thought, other in zip(parts, ("2+2 is 4", "3+3 is 6"), ("3+3 is 6", "2+2 is 4"), strict=True):
        (start, end) = part.spans[0]
        assert thought in part.text[start:end]
        assert other not in part.text


def test_template_without_end_of_answer_learns_the_token_that_a_next_message_begins_with():
    found = template("glm4moe")
    (part,) = found.render(CHATS["one answer"], loss_on="answers")
    assert [part.text[start:end] for start, end in part.spans] == ["\n<think></think>\nhello<|user|>"]
    assert part.text.endswith("hello<|user|>")
    assert found.end_of_answer() == "<|user|>"
    (part,) = found.render([user("2+2?"), answer("", tool_calls=[call(a=2, b=2)])], loss_on="answers")
    assert part.text.endswith("</tool_call><|observation|>")


@pytest.mark.parametrize("name", ["llama3", "lfm2", "phi3"])
def test_a_template_that_leaves_out_tool_calls_is_refused(name):
    with pytest.raises(ValueError, match="leaves out tool call 1 of message 2; use a template that writes tool calls"):
        template(name).render(CHATS["call"], loss_on="answers", variables={"tools": TOOLS})


def test_a_template_that_writes_one_of_two_tool_calls_is_refused():
    with pytest.raises(ValueError, match="leaves out tool call 2 of message 2"):
        template("gptoss").render(CHATS["two calls"], loss_on="answers", variables={"tools": TOOLS})


def test_a_template_that_leaves_out_the_content_beside_a_tool_call_is_refused():
    with pytest.raises(ValueError, match="leaves out the content of message 2, which also has tool calls"):
        template("llama3_1").render(CHATS["content and call"], loss_on="answers", variables={"tools": TOOLS})


@pytest.mark.parametrize("arguments", [{"a": 2, "b": 2}, '{"a": 2, "b": 2}'])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_5_think", "glm4moe", "deepseekv3"])
def test_arguments_of_calls_may_be_objects_or_json(name, arguments):
    messages = [
        user("2+2?"),
        answer("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": arguments}}]),
    ]
    (part,) = template(name).render(messages, loss_on="answers")
    (start, end) = part.spans[0]
    assert "add" in part.text[start:end]
    assert part.text[start:end].count("2") == 2


# --- which answers carry loss ---


def loss(row: Row, **options) -> list[str]:
    tokenizer = make()
    encoded = encode([row], tokenizer, max_length=500, **options)
    labels = [encoded[i]["labels"] for i in range(len(encoded))]
    return [tokenizer.decode(each[each != IGNORED]) for each in labels]


THREE = CHATS["three answers"]


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"masked": True}]
)
def test_flagged_answers_carry_no_loss(flag):
    messages = tuple({**message, **flag} if message["content"] == "bye" else message for message in THREE)
    assert loss(Row("chat", "f:1", messages=messages)) == ["hello<|end|>y z<|end|>"]


def test_flags_that_ask_for_loss_change_nothing():
    messages = tuple({**m, "weight": 1, "masked": False} if m["role"] == "assistant" else m for m in THREE)
    assert loss(Row("chat", "f:1", messages=messages)) == ["hello<|end|>bye<|end|>y z<|end|>"]


def test_loss_on_the_last_answer():
    assert loss(Row("chat", "f:1", messages=tuple(THREE)), loss_on="last") == ["y z<|end|>"]
