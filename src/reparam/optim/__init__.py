"""Optimizers and their groups: AdamW whose states are paged, in float32 or in 8 bits; LoRA+'s rates by role."""

from reparam.optim.groups import check_rates, lora_plus
from reparam.optim.paged import PagedAdamW
from reparam.optim.pager import Paging

__all__ = ["PagedAdamW", "Paging", "check_rates", "lora_plus"]
