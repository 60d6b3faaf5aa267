"""Small tokenizers and the kinds of chat templates in use, for the tests of the training data."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, END, PAD, START, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|start|>", "<|user|>", "<|assistant|>"
SPECIALS = [BOS, END, PAD, START, USER, ASSISTANT, "<|system|>"]

# The template of the embedded model.
MARKED = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MARKED_WITHOUT_END = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
STRIPS = CHATML.replace("m.content", "m.content | trim")
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start|>' + m.role + '<|user|>\n\n' + m.content | trim + '<|end|>' %}"
    "{% if loop.first %}{{ bos_token + text }}{% else %}{{ text }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|user|>\n\n' }}{% endif %}"
)
DROPS_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
TOOLS_AS_JSON = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)")
# Drops what was thought in earlier turns, as reasoning models do.
FORGETS_THOUGHTS = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
# Thinks before the last answer only.
THINKS_LAST = CHATML.replace("m.content", "('<think>' if loop.last and m.role == 'assistant' else '') + m.content")
# Its generation prompt opens a thought that a rendered answer does not have.
OPENS_THOUGHT = CHATML.replace("{{ '<|start|>assistant\n' }}", "{{ '<|start|>assistant\n<think>\n' }}")
# Appends an end token to whatever has no generation prompt, as Phi-3 does.
ENDS_THE_TEXT = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# Ends the last answer with another token, as gpt-oss does.
ENDS_LAST_OTHERWISE = CHATML.replace(
    "+ '<|end|>\n'", "+ ('<|system|>' if loop.last and m.role == 'assistant' else '<|end|>')"
)
# Ends an answer and then its turn, as Command-R does.
ENDS_TWICE = CHATML.replace("+ '<|end|>", "+ '<|pad|><|end|>")
# Marks the content and its end apart.
MARKED_TWICE = MARKED.replace("<|end|>{% endgen", "{% endgeneration %}{% generation %}<|end|>{% endgen")
PLAIN = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@cache
def _backend(swallows_space: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(s, rstrip=swallows_space and s == ASSISTANT) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["what is the name of the function", "the sum of two numbers is a number", "a::b ::c x::y ::", "é ü ñ 北京"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    return tokenizer.to_str()


def make(
    template: str | None = MARKED, *, adds_bos: bool = False, end: str | None = END, swallows_space: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 330 tokens. `swallows_space`: the assistant's token takes the space behind it."""
    backend = Tokenizer.from_str(_backend(swallows_space))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=end, pad_token=PAD)
    tokenizer.chat_template = template
    return tokenizer
