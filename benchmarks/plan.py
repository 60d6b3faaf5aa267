"""Compare the plan of a step's memory with what real steps hold, by torch's profiler, on this CPU.

Every method that can be planned, on dense, NF4 and int8 weights, with and without gradient checkpointing, on a Llama
model of four layers with random weights. "Held" is the model and the most that two steps have beside it. The last row
is a plan of a model of 70 billion parameters, from its configuration alone; only its time is measured.

    python benchmarks/plan.py [--methods lora,dora] [--out docs/evidence/plan.json]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from reparam.core.text import sized
from reparam.hf.chunked import ChunkedLoss
from reparam.plan.estimate import Estimator, plan
from reparam.plan.longest import Longest
from reparam.train.config import Config, resolve
from reparam.train.model import attached, loaded

ROWS, TOKENS = 4, 128
LIMIT = 0.01
METHODS = ("lora", "dora", "adalora", "intrinsic", "bitfit", "full", "molora", "bottleneck")
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def held(config: Config) -> int:
    """Bytes of the model, and the most that two steps have beside it."""
    model = loaded(config.base)
    adapter = attached(config, model, config.method)
    model.train()
    if config.run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    losses = ChunkedLoss(model) if config.run.chunked_loss else contextlib.nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        optimizer = torch.optim.AdamW(adapter.parameters())
        ids, mask = torch.zeros(ROWS, TOKENS, dtype=torch.int64), torch.ones(ROWS, TOKENS, dtype=torch.int64)
        mask[0, 0] = 0  # a row with padding
        with losses:
            for _ in range(2):
                model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    now = peak = 0
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(own.values()) + peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder)
        for method, storage, checkpointing in itertools.product(
            given.methods.split(","), ("dense", "nf4", "int8"), (False, True)
        ):
            config = resolve(
                None,
                {
                    "base.path": folder,
                    "base.dtype": "float32",
                    "base.storage": storage,
                    "method.name": method,
                    "run.gradient_checkpointing": checkpointing,
                },
            )
            case = f"{method}, {storage}{', checkpointing' if checkpointing else ''}"
            try:
                planned, real = Estimator(config).peak(ROWS, TOKENS).total, held(config)
            except ValueError as error:
                print(f"{case}: {str(error).splitlines()[0]}")
                continue
            rows.append({"case": case, "planned": planned, "held": real, "error": planned / real - 1})
            print(f"{case}: planned {sized(planned)}, held {sized(real)}, {rows[-1]['error']:+.2%} (limit {LIMIT:.0%})")
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(f"worst: {worst['case']}, {worst['error']:+.2%} (limit {LIMIT:.0%})")
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LARGE, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        config = resolve(None, {"base.path": folder, "base.storage": "nf4", "run.gradient_checkpointing": True})
        begin = time.process_time()
        made = plan(config, Longest(1, 2048, 1.0, "data.max_length"), limit=48 * 2**30)
        seconds = time.process_time() - begin
    print(f"70 billion parameters: {sized(made.peak.total)} planned, in {seconds:.1f} CPU seconds (limit 30)")
    if given.out is not None:
        found = {"torch": torch.__version__, "rows": rows, "70B": {"planned": made.peak.total, "cpu_seconds": seconds}}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
