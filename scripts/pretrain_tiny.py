"""Train the embedded test model and its tokenizer on the sources of Python's standard library.

    OMP_WAIT_POLICY=PASSIVE python scripts/pretrain_tiny.py assets/tiny-python --tokens 12.5e6

Model: Llama architecture, hidden size 256, 6 layers, 4 query and 2 key-value heads, tied embeddings, 5.48 M parameters.
Tokenizer: byte-level BPE, 4096 tokens, of which four are for chats. Optimizer: Muon for the matrices, AdamW for
embeddings and norms; the learning rate is constant, then falls linearly to zero over the last 40 % of the steps. The
weights are committed, because the text differs between Python patch releases; `figures.json` in the same folder has the
release, the number of tokens and the scores. A run that was stopped continues from `OUT.partial`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from stdlib_text import files, held_out
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role'] + ': expected system, user or assistant') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LENGTH = 512  # tokens per training row
BATCH = 16  # rows per step


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[EOS, PAD, USER, ASSISTANT, SYSTEM, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=1024)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def quantize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode all texts, each followed by the end-of-text token, as one tensor of token ids [T]."""
    end = tokenizer.convert_tokens_to_ids(EOS)
    ids = [i for encoding in tokenizer(texts)["input_ids"] for i in [*encoding, end]]
    return torch.tensor(ids)


def build(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the model with new random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, ids: torch.Tensor, size: int, rows: int | None = None) -> float:
    """Cross entropy in bits per byte of the token ids [T], which encode `size` bytes, on rows of LENGTH tokens.

    `rows` limits the number of rows that are evaluated.
    """
    model.eval()
    count = len(ids) // LENGTH
    table = ids[: count * LENGTH].view(count, LENGTH)[:rows]
    nats = sum(model(input_ids=b, labels=b).loss.item() * b.shape[0] * (LENGTH - 1) for b in table.split(8))
    model.train()
    predicted = table.shape[0] * (LENGTH - 1)
    return nats / predicted / math.log(2) * len(ids) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=12.5e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="number of steps between checkpoints")
    args = parser.parse_args()
    partial = args.out.with_name(args.out.name + ".partial")

    sources = list(files())
    train = [text for path, text in sources if not held_out(path)]
    test = [text for path, text in sources if held_out(path)]
    tokenizer = train_tokenizer(train)
    train_ids, test_ids = quantize(tokenizer, train), quantize(tokenizer, test)
    test_bytes = sum(len(t.encode()) for t in test)
    rows = train_ids[: len(train_ids) // LENGTH * LENGTH].view(-1, LENGTH)
    print(f"{len(train)} training files, {len(train_ids):,} tokens; {len(test)} held out", flush=True)

    torch.manual_seed(args.seed)
    model = build(tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = [muon, adam]
    peaks = [muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]]
    steps = int(args.tokens / (LENGTH * BATCH))
    start, spent = 0, 0.0
    if (partial / "state.pt").exists():
        state = torch.load(partial / "state.pt", weights_only=True)
        model.load_state_dict(load_file(partial / "model.safetensors"), strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, spent = state["step"], state["seconds"]

    fast = torch.compile(model)  # with autocast, three times as fast as float32 on the CPU used
    began, cpu = time.time(), time.process_time()
    for step in range(start, steps):
        per_epoch = len(rows) // BATCH
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + step // per_epoch))
        batch = rows[order[step % per_epoch * BATCH :][:BATCH]]
        factor = min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        with torch.autocast("cpu", torch.bfloat16):
            loss = fast(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            rate = (step + 1 - start) * BATCH * LENGTH / (time.time() - began)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % args.save_every == 0:
            score = bits_per_byte(model, test_ids, test_bytes, rows=64)
            print(f"step {step} held out, first 64 rows: {score:.4f} bits per byte", flush=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            seconds = spent + time.process_time() - cpu
            state = {"optimizers": [o.state_dict() for o in optimizers], "step": step + 1, "seconds": seconds}
            torch.save(state, partial / "state.pt")

    model.to(torch.bfloat16).float()  # measure the weights as they are saved, in bfloat16
    figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training files": len(train),
        "training tokens seen": steps * BATCH * LENGTH,
        "training tokens distinct": len(train_ids),
        "held-out files": len(test),
        "held-out bits per byte": round(bits_per_byte(model, test_ids, test_bytes), 4),
        "CPU minutes": round((spent + time.process_time() - cpu) / 60, 1),
    }
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
