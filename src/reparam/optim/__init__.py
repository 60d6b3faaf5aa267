"""AdamW with paged states in float32 or 8 bits, and parameter groups with LoRA+'s learning rates."""

from reparam.optim.groups import check_rates, lora_plus
from reparam.optim.paged import PagedAdamW
from reparam.optim.pager import Paging

__all__ = ["PagedAdamW", "Paging", "check_rates", "lora_plus"]
