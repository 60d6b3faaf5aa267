"""transformers' continuous batching, as the engine uses it: its sizes, and what the engine adds to it.

Own additions replace attributes of the manager's own objects; the library's code is not changed. The names that this
relies on are not a documented interface, so they are checked at start.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from reparam.errors import ReparamError
from reparam.serve import attention
from reparam.serve.limits import PAGE, Limits
from reparam.serve.sampling import Sampling

TESTED = ">=5.23,<5.24"
"""The releases of transformers that the engine is tested with."""
BEFORE = (
    "add_request cancel_request pause start stop is_running warmup output_router logit_processor.logits_processor "
    "logit_processor.tensors_required logit_processor.supported_keys logit_processor.do_processing _original_attn_impl "
    "_generation_loop_body background_thread_status.local_status background_thread_status.can_accept_new_requests"
)
AFTER = (
    "batch_processor.cache.search_prefix_match batch_processor.cache.cache_allocators "
    "batch_processor.inputs_and_outputs.requests_in_batch batch_processor.scheduler.clear_cancelled_requests "
    "batch_processor.scheduler.set_request_cancellation batch_processor.scheduler._requests_to_cancel"
)
SALTED = 16
"""How many tokens of a request are changed before they are hashed: all in the first block, on which the others rest."""


def make_manager(model: nn.Module, limits: Limits, sampling: Sampling, router: OutputRouter) -> Any:
    """A manager that is ready to start, with all sizes set.

    Raises ReparamError if transformers lacks a name that the engine needs, and ValueError if it cannot batch the model.
    """
    held: Any = model
    if not hasattr(held, "init_continuous_batching") or not held.can_generate():
        raise ValueError(f"{type(model).__name__} is no transformers model that generates, so it cannot be served")
    manager: ContinuousBatchingManager = held.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
        ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=limits.cache_tokens // PAGE,
            max_batch_tokens=limits.step_tokens,
            max_requests_per_batch=limits.requests,
            max_memory_percent=0.9,
            max_blocks_per_request=0,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        ),
    )
    check_names(manager, BEFORE.split())
    if attention.suits(held.config, held.device):
        attention.register()
        manager._original_attn_impl = held.config._attn_implementation  # `stop` puts it back
        held.set_attn_implementation(attention.NAME)
    logits = manager.logit_processor
    logits.logits_processor = LogitsProcessorList([sampling])
    logits.tensors_required, logits.supported_keys, logits.do_processing = 1, {}, True
    manager.output_router = router
    try:
        manager.warmup()
        check_names(manager, AFTER.split())
        if held.config._attn_implementation == attention.NAME:
            check_names(manager, attention.CACHE.split())
            processor: Any = manager.batch_processor
            for allocator in processor.cache.cache_allocators.values():
                check_names(allocator, attention.ALLOCATOR.split())
    except BaseException:
        if manager._original_attn_impl is not None:
            held.set_attn_implementation(manager._original_attn_impl)
        raise
    return manager


def check_names(root: object, paths: Sequence[str]) -> None:
    """Raise ReparamError, which names the first one that is missing, unless the object has all attributes."""
    for path in paths:
        found: Any = root
        for name in path.split("."):
            if not hasattr(found, name):
                raise ReparamError(
                    f"transformers {transformers.__version__} has no {type(found).__name__}.{name}, which the serving "
                    f"engine needs; install transformers{TESTED}"
                )
            found = getattr(found, name)


def largest_request(manager: Any) -> int:
    """The most tokens, of prompt and answer together, that one request can have in an empty cache."""
    return infer_max_single_request_tokens(manager.batch_processor.cache)


def add_salt(manager: Any, salt_of: Callable[[str], bytes], found: Callable[[str, int], None]) -> None:
    """Keep the cached keys of different salts apart. `salt_of` gives the salt of a request, by its id.

    `found` is told how many tokens of a request are in the cache.

    transformers finds blocks of the cache by a hash of tokens alone, so a request would get the keys that another
    adapter computed for the same tokens.
    """
    cache = manager.batch_processor.cache
    search = cache.search_prefix_match

    def search_salted(request: str, ids: list[int]) -> int:
        count: int = search(request, salted(ids, salt_of(request)))
        found(request, count)
        return count

    cache.search_prefix_match = search_salted
    for allocator in cache.cache_allocators.values():
        cache_blocks = allocator.mark_complete_blocks

        def mark(request: str, ids: list[int], count: int, own: Callable[..., None] = cache_blocks) -> None:
            own(request, salted(ids, salt_of(request)), count)

        allocator.mark_complete_blocks = mark


def salted(ids: Sequence[int], salt: bytes) -> list[int]:
    """The ids with numbers added that depend on the salt, within 31 bits: different ids stay different.

    >>> salted([1, 2, 3], b"a") == salted([1, 2, 3], b"b"), salted([1, 2, 3], b"a") == salted([1, 2, 4], b"a")
    (False, False)
    """
    bits = hashlib.blake2b(salt, digest_size=4 * SALTED).digest()
    numbers = [int.from_bytes(bits[i : i + 4], "little") for i in range(0, len(bits), 4)]
    changed = [(token + number) & 0x7FFFFFFF for token, number in zip(ids, numbers, strict=False)]
    return [*changed, *ids[len(changed) :]]


def on_cancelled(manager: Any, told: Callable[[set[str], set[str]], set[str]]) -> None:
    """Call `told` when the loop drops cancelled requests, with the ids to cancel and those that it had.

    `told` returns the ids that are to be cancelled again at the next step.
    """
    scheduler = manager.batch_processor.scheduler
    clear = scheduler.clear_cancelled_requests

    def cleared() -> Any:
        wanted = set(scheduler._requests_to_cancel)
        states = clear()
        if wanted:
            for request in told(wanted, {state.request_id for state in states}):
                scheduler.set_request_cancellation(request)
        return states

    scheduler.clear_cancelled_requests = cleared


def on_step(manager: Any, done: Callable[[float], None]) -> None:
    """Call `done` after each step, with the seconds that it took: scheduling, the model, and sending the tokens."""
    body = manager._generation_loop_body

    def timed(*args: Any, **kwargs: Any) -> Any:
        start, number = time.perf_counter(), manager.current_batch
        go_on = body(*args, **kwargs)
        if manager.current_batch != number:
            done(time.perf_counter() - start)
        return go_on

    manager._generation_loop_body = timed


def vocabulary_of(model: nn.Module) -> int:
    """The number of ids that the model's embedding has."""
    held: Any = model
    weight: torch.Tensor = held.get_input_embeddings().weight
    return len(weight)
