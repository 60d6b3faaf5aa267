"""Where the answers of chats are, in the templates of real models. The judge is TRL's twin of each template, in which
`{% generation %}` marks what the model writes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import trl
from chat_tokenizers import make

from reparam.data.batches import IGNORED
from reparam.data.chat import ChatTemplate
from reparam.data.encode import encode
from reparam.data.messages import FLAGS, learned
from reparam.data.row import Row

FOLDER = Path(trl.__file__).with_name("chat_templates")
TWINS = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
TOKENS = re.compile(r"<[|｜]?[a-z_▁]+[|｜]?>|<\|[A-Z_]+\|>|</s>", re.IGNORECASE)
# The template renders a second header after the response of a tool, where generation has none: the model writes it.
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


def check(name: str, messages: list[dict]) -> bool:
    """Compare the answers of a chat with what the twin marks. Returns whether the template takes the chat."""
    variables = {"tools": TOOLS} if any("tool_calls" in message for message in messages) else {}
    try:
        parts = template(name).render(messages, loss_on="answers", variables=variables)
    except ValueError:
        return False  # a role or a tool call that the template refuses or leaves out
    found = [part.text[start:end] for part in parts for start, end in part.spans]
    plain = [{key: value for key, value in message.items() if key not in FLAGS} for message in messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    marked = marked_by_twin(name, plain, variables)
    expected = [text for text, message in zip(marked, answers, strict=True) if learned(message)]
    assert len(found) == len(expected)
    prompts = "".join(part.text[:start] for part in parts for start, _ in part.spans)
    for ours, twins in zip(found, expected, strict=True):
        # The twin may also mark the generation prompt, and what stands after the token that ends the answer.
        kept = twins.replace("<|return|>", "<|end|>") if "<|end|>" in ours[-7:] else twins
        assert ours.strip() in kept, (messages, ours, twins)
        before, after = kept.rsplit(ours.strip(), 1)
        assert not after.replace("<|end|>", "").strip(), (messages, ours, twins)
        assert before.strip() in prompts, (messages, ours, twins)
    return True


@pytest.mark.parametrize("name", TWINS)
def test_answers_are_what_the_twin_marks(name):
    for kind, messages in CHATS.items():
        if (name, kind) not in ODD:
            check(name, messages)


WORDS = ["a", "4", "hi", "2+2", "é", "北京", "{x}", '"q"', "<b>", "line\nbreak", "two  spaces"]
EXCLUDED = ({"weight": 0}, {"train": False}, {"loss": False}, {"masked": True}, {"weight": 1})


def random_chat(draw: random.Random, *, tools: bool) -> list[dict]:
    """Up to three questions, with tool calls, reasoning, flags and empty contents, as real data has them."""

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))

    def drawn(content: str, **others) -> dict:
        flag = draw.choice(EXCLUDED) if draw.random() < 0.3 else {}
        thought = {"reasoning_content": words()} if draw.random() < 0.4 else {}
        return answer(content, **others, **flag, **thought)

    found = [{"role": "system", "content": words()}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        found.append(user(words()))
        for _ in range(draw.choice((0, 0, 1, 2)) if tools else 0):
            calls = [call(a=draw.randint(0, 9), b=draw.choice((1, "x", [1, 2]))) for _ in range(draw.choice((1, 1, 2)))]
            found.append(drawn(draw.choice(("", words())), tool_calls=calls))
            found += [result(words()) for _ in calls]
        found.append(drawn(words() if draw.random() < 0.95 else ""))
    return found


@pytest.mark.parametrize("name", TWINS)
def test_random_chats_have_the_answers_that_the_twin_marks(name):
    draw = random.Random(name)
    odd = {name for name, _ in ODD}
    taken = sum(check(name, random_chat(draw, tools=number % 2 == 1 and name not in odd)) for number in range(5))
    assert taken > 0 or name in ("cohere", "cohere2", "gemma", "gemma3")  # they take few chats


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_call_without_a_header_does_not_begin_in_an_earlier_turn(name):
    """These templates write the header of calls for the first call of a chat alone."""
    assert check(
        name, [*CHATS["call"], user("3+3?"), answer("", tool_calls=[call(a=3, b=3)]), result("6"), answer("6")]
    )


def test_the_token_that_ends_an_answer_is_found_after_reasoning_that_is_dropped_later():
    calls = [answer("", tool_calls=[call(a=2, b=2)], reasoning_content="I add"), result("4")]
    assert check("glm4moe", [user("2+2?"), *calls, answer("4", reasoning_content="done")])


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "nemotron_3_nano"])
def test_the_last_answer_may_be_one_without_loss(name):
    thought = answer("four", reasoning_content="2+2 is 4")
    assert check(name, [user("2+2?"), thought, user("3+3?"), answer("six", weight=0)])


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
