"""The same job in several tools: CPU seconds to the first step, and tokens per CPU second in training.

    python benchmarks/ease.py [--rounds 2] [--steps 30] [--packing] [--llama-factory PYTHON]

The job: LoRA of rank 8 on all linear maps of a copy of the embedded model in float32, 10,000 chat rows, 8 rows (or
packs of up to 256 tokens) per step, one thread. Each tool runs as its command line does, in a process of its own, and
computes its loss as it does by default. A hook on torch's optimizers notes, after each step, the CPU seconds of the
process and of those that started it. A hook on embeddings counts the tokens that are no padding. The process ends after
the last step. No tool evaluates or saves before.
`--llama-factory` names the Python of an environment with LLaMA-Factory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny-python"
ROWS, SKIPPED, BATCH = 10_000, 5, 8  # steps that are left out of the speed
HOOK = """
import json, os, sys
import psutil, torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

tokens, steps, embedding = [0], [], F.embedding
if "EASE_FILE" in os.environ:
    def counted(ids, *rest, **more):
        if torch.is_grad_enabled():
            tokens[0] += int((ids != int(os.environ["EASE_PAD"])).sum())
        return embedding(ids, *rest, **more)

    def seconds():
        found, process = 0.0, psutil.Process()
        while process is not None and process.pid != int(os.environ["EASE_TOP"]):
            times = process.cpu_times()
            found, process = found + times.user + times.system, process.parent()
        return found

    def noted(optimizer, arguments, settings):
        steps.append((seconds(), tokens[0]))
        if len(steps) == int(os.environ["EASE_STEPS"]):
            with open(os.environ["EASE_FILE"], "w") as file:
                json.dump(steps, file)
            os._exit(0)

    F.embedding = torch.nn.functional.embedding = counted
    register_optimizer_step_post_hook(noted)
"""


def write_rows(folder: Path) -> Path:
    """Write the rows: chats of one or two turns, 4 to 12 words a message, from the seed 0."""
    draw = random.Random(0)
    words = "value index name count self other result table path line key item node left right".split()  # noqa: SIM905
    file = folder / "rows" / "train.jsonl"
    file.parent.mkdir()
    with file.open("w") as out:
        for _ in range(ROWS):
            turns = []
            for _ in range(draw.randint(1, 2)):
                for role in ("user", "assistant"):
                    text = " ".join(draw.choices(words, k=draw.randint(4, 12)))
                    turns.append({"role": role, "content": text})
            out.write(json.dumps({"messages": turns}) + "\n")
    info = {"rows": {"file_name": str(file), "formatting": "sharegpt", "columns": {"messages": "messages"}}}
    info["rows"]["tags"] = {  # type: ignore[assignment]
        **{"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        "system_tag": "system",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return file


def write_base(folder: Path) -> Path:
    """Write a copy of the embedded model in float32, which all tools then load as it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = folder / "base"
    AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(base)
    return base


def commands(
    folder: Path, base: Path, rows: Path, steps: int, other: str | None, *, packing: bool
) -> dict[str, list[str]]:
    """The command of each tool."""
    python = sys.executable
    reparam = [python, "-m", "reparam", "train"]
    shared = ["--max_steps", str(steps + 1), "--per_device_train_batch_size", str(BATCH), "--lora_r", "8"]
    shared += ["--learning_rate", "1e-3", "--max_length", "256", "--model_name_or_path", str(base)]
    ours = (
        "--dtype float32 --val_size 0.001 --data.score_rows 0 --data.cache off --eval_steps 1000 --save_steps 1000 "
        f"--data {rows}"
    )
    theirs = (
        "--use_peft --lora_alpha 16 --lora_dropout 0 --lora_target_modules all-linear --report_to none --bf16 false "
        "--dtype float32 --gradient_checkpointing false --save_strategy no --use_cpu true --shuffle_dataset true "
        f"--packing {str(packing).lower()} --dataset_name {rows.parent} --output_dir {folder / 'trl'}"
    )
    packed = ["--packing"] if packing else []
    found = {
        "reparam train": [*reparam, *shared, *ours.split(), *packed, "-o", str(folder / "ours")],
        "trl sft": [str(Path(python).parent / "trl"), "sft", *shared, *theirs.split()],
    }
    if other is not None:
        keys = {
            **{"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
            **{"model_name_or_path": str(base), "dataset": "rows", "dataset_dir": str(folder), "cutoff_len": 256},
            **{"per_device_train_batch_size": BATCH, "max_steps": steps + 1, "learning_rate": 1e-3, "bf16": False},
            **{"output_dir": str(folder / "llama"), "report_to": "none", "neat_packing": packing, "use_cpu": True},
            **{"disable_gradient_checkpointing": True, "save_strategy": "no", "template": "default"},
        }
        file = folder / "llama.yaml"
        file.write_text(json.dumps(keys))  # JSON is YAML
        found["llamafactory-cli train"] = [str(Path(other).parent / "llamafactory-cli"), "train", str(file)]
    return found


def measured(command: list[str], folder: Path, steps: int, pad: int) -> tuple[float, float] | str:
    """CPU seconds to the end of the first step, and tokens per CPU second; or the last line of an error."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    out = folder / "steps.json"
    out.unlink(missing_ok=True)
    shutil.rmtree(folder / "hf", ignore_errors=True)  # no tool finds rows that it has encoded before
    environment = {
        **os.environ,
        **{"PYTHONPATH": os.pathsep.join([str(folder / "hook"), os.environ.get("PYTHONPATH", "")])},
        **{"EASE_FILE": str(out), "EASE_TOP": str(os.getpid()), "EASE_STEPS": str(steps), "EASE_PAD": str(pad)},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "HF_HOME": str(folder / "hf")},
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not out.is_file():
        return (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    noted = json.loads(out.read_text())
    (began, before), (ended, after) = noted[SKIPPED - 1], noted[-1]
    return noted[0][0], (after - before) / (ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--llama-factory", help="Python of an environment with LLaMA-Factory")
    parser.add_argument("--packing", action="store_true")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    pad = AutoTokenizer.from_pretrained(EMBEDDED).pad_token_id
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, rows = write_base(folder), write_rows(folder)
        for number in range(given.rounds):
            tools = list(commands(folder, base, rows, given.steps, given.llama_factory, packing=given.packing).items())
            for name, command in tools[number % len(tools) :] + tools[: number % len(tools)]:
                result = measured([*command, *(["--fresh"] if "reparam" in name else [])], folder, given.steps, pad)
                print(f"round {number + 1}: {name}: {result}", file=sys.stderr, flush=True)
                if not isinstance(result, str):
                    found.setdefault(name, []).append(result)
    print("| tool | CPU seconds to the end of the first step | tokens per CPU second |\n|---|---|---|")
    for name, results in found.items():
        first, speed = (statistics.median(values) for values in zip(*results, strict=True))
        print(f"| `{name}` | {first:.1f} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
