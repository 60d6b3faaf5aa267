"""Arguments of TRL's trainers under which they compute what reparam's runs in the tests compute."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 0,
    "data_seed": 0,
}
