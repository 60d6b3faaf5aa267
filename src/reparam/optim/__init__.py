"""Optimisers: AdamW whose states are paged, in float32 or in 8 bits."""

from reparam.optim.paged import PagedAdamW
from reparam.optim.pager import Paging

__all__ = ["PagedAdamW", "Paging"]
