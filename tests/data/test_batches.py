"""The dataset and its batches, in a plain loop and under transformers' Trainer; the preview."""

from __future__ import annotations

import io

import chat_tokenizers as kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from reparam.data.batches import IGNORED, Collator, Encoded, padding_id
from reparam.data.encode import encode
from reparam.data.preview import preview
from reparam.data.row import Row


def encoded(*answers: str, template: str = kit.MARKED) -> Encoded:
    rows = [
        Row("chat", f"f.jsonl:{i}", messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": a}))
        for i, a in enumerate(answers, start=1)
    ]
    return encode(rows, kit.make(template), max_length=500)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(kit.make()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


# --- batches ---


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    multiple=st.sampled_from([1, 8]),
    pad=st.integers(0, 5),
)
def test_batches_hold_the_examples_and_nothing_else(lengths, multiple, pad):
    data = encoded(*["x" * n for n in lengths])
    batch = Collator(pad_id=pad, multiple_of=multiple)([data[i] for i in range(len(data))])
    longest = max(len(e["input_ids"]) for e in data)
    size = batch["input_ids"].shape[1]
    assert longest <= size < longest + multiple
    assert size % multiple == 0
    assert batch["row"].tolist() == list(range(len(data)))
    for i, example in enumerate(data):
        n = len(example["input_ids"])
        assert torch.equal(batch["input_ids"][i, :n], example["input_ids"])
        assert torch.equal(batch["labels"][i, :n], example["labels"])
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (size - n)
        assert (batch["input_ids"][i, n:] == pad).all()
        assert (batch["labels"][i, n:] == IGNORED).all()


def test_end_token_keeps_its_loss_when_it_is_the_pad_token(model):
    data = encoded("a", "the name of the function")
    end = kit.make().eos_token_id
    batch = Collator(pad_id=end)([data[0], data[1]])
    assert (batch["labels"] == end).sum(1).tolist() == [1, 1]
    batch.pop("row")
    with torch.no_grad():
        together = model(**batch).loss
        alone = [model(input_ids=e["input_ids"][None], labels=e["labels"][None]).loss for e in data]
    counts = torch.tensor([(e["labels"] != IGNORED).sum() for e in data])
    torch.testing.assert_close(together, (torch.stack(alone) * counts).sum() / counts.sum())


def test_padding_id():
    tokenizer = kit.make()
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids(kit.PAD)
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert padding_id(tokenizer) == 0


def test_a_data_loader_with_workers_gives_every_row_once():
    data = encoded(*map(str, range(10)))
    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=1, collate_fn=Collator(pad_id=0))
    rows = torch.cat([batch["row"] for batch in loader])
    assert sorted(rows.tolist()) == list(range(10))


def test_index_out_of_range():
    data = encoded("a", "b")
    for index in (2, -1):
        with pytest.raises(IndexError, match="of 2"):
            data[index]


def test_trainer_takes_the_batches_and_rows_never_reach_the_model(model, tmp_path):
    seen: dict[bool, list[int]] = {True: [], False: []}  # by whether the model was training
    arguments: set[str] = set()

    class Run(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen[model.training] += inputs.pop("row").tolist()
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    data = encoded(*["the name " * (i % 3) + str(i) for i in range(8)])
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: arguments.update(kwargs), with_kwargs=True)
    try:
        Run(model, settings, data_collator=Collator(pad_id=0), train_dataset=data, eval_dataset=data).train()
    finally:
        hook.remove()
    assert sorted(seen[True]) == list(range(8))
    assert sorted(seen[False]) == list(range(8))
    assert {"input_ids", "labels", "attention_mask"} <= arguments
    assert "row" not in arguments


# --- preview ---


def shown(data: Encoded, *, terminal: bool, rows: int = 3, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    colors = "standard" if terminal else None
    console = Console(file=file, force_terminal=terminal, color_system=colors, width=1000, legacy_windows=False)
    console.print(preview(data, kit.make(), rows=rows))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_preview_in_a_log_brackets_what_carries_loss():
    lines = shown(encoded("the name", "b", "c"), terminal=False, rows=2).splitlines()
    assert lines[0] == "⟦tokens with loss⟧ tokens without loss"
    assert lines[2] == "<|user|>q<|end|><|assistant|>⟦the name<|end|>⟧"
    assert lines[3].startswith("f.jsonl:2: 6 tokens, 2 with loss")
    assert len(lines) == 5


def test_preview_on_a_terminal_colors_what_carries_loss():
    text = shown(encoded("the name"), terminal=True)
    assert "\x1b[2m<|user|>q<|end|><|assistant|>\x1b[0m\x1b[1;32mthe name<|end|>\x1b[0m" in text
    assert "⟦" not in text


def test_preview_shows_control_characters_and_never_sends_them():
    text = shown(encoded("a\n\tb\x1b[31m\x00\u202ec[red]d"), terminal=False)
    assert "⟦a↵\n⇥b␛[31m␀\\u202ec[red]d<|end|>⟧" in text
    assert not set(text) & set("\x1b\x00\u202e\t")


def test_preview_in_ascii():
    text = shown(encoded("é\n"), terminal=False, encoding="ascii")
    assert "[[\\xe9\\n\n<|end|>]]" in text


def test_preview_leaves_out_the_middle_of_a_long_run_but_not_the_answer():
    data = encode(
        [Row("completion", "f.jsonl:1", prompt="x" * 10_000, completion="the name")], kit.make(), max_length=20_000
    )
    text = shown(data, terminal=False)
    assert "9,600 characters" in text
    assert text.rstrip().endswith("⟦the name<|end|>⟧")
    assert len(text) < 1000


def test_preview_of_fewer_rows_than_asked():
    assert len(shown(encoded("a"), terminal=False, rows=5).splitlines()) == 3
