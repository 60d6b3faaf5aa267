"""Models of the GPU benchmark: a Llama shape with random weights, made directly in a storage, ours or bitsandbytes'.

The model is made without memory (on "meta"). Then each linear map in turn gets a random matrix in bfloat16 on the
device, which is quantized and let go, so that no more than one matrix is ever dense. LoRA goes on all linear maps of
the blocks, as in QLoRA (arXiv 2305.14314, §4), with gradient checkpointing. Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import bitsandbytes as bnb
import measure as m
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import reparam
from reparam.optim import PagedAdamW
from reparam.sites.linear import Linear

R, ALPHA, LR = 64, 16, 1e-4
BLOCKS_OF_7B = m.Shape(hidden=4096, inner=11008, layers=4, heads=32)
WHOLE_65B = m.Shape(hidden=8192, inner=22016, layers=80, heads=64, vocabulary=32000)
Make = Callable[[nn.Linear, Tensor], nn.Module]


def nf4(module: nn.Linear, w: Tensor) -> nn.Module:
    """Our linear map over the matrix quantized as QLoRA quantizes it; `module` has none."""
    return Linear(module, reparam.NF4().quantize(w))


def dense(module: nn.Linear, w: Tensor) -> nn.Module:
    """The module itself."""
    module.weight = nn.Parameter(w, requires_grad=False)
    return module


def bitsandbytes_nf4(module: nn.Linear, w: Tensor) -> nn.Module:
    """bitsandbytes' linear map over the same format; moving its parameter to a device is what quantizes it."""
    sizes = module.in_features, module.out_features
    quantized = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=w.dtype, quant_type="nf4", device="meta")
    parameter = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", module=quantized)
    quantized.weight = parameter.to(w.device)
    return quantized


def build(shape: m.Shape, device: torch.device, make: Make) -> nn.Module:
    """A frozen model of this shape in bfloat16, whose linear maps `make` makes of an empty module and a matrix."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.endswith(m.LINEARS):
            model.set_submodule(path, make(module, random(module.weight, device)))
    with device:  # numbers that are computed, not trained
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # embeddings, norms and the head
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Parameter(random(parameter, device), requires_grad=False))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def random(like: Tensor, device: torch.device) -> Tensor:
    """Ones for a norm, and small normal numbers for a matrix."""
    fresh = torch.empty(like.shape, dtype=like.dtype, device=device)
    return fresh.fill_(1) if like.ndim == 1 else fresh.normal_(0, 0.02)


def ours(model: nn.Module, *, budget: int | None = None, page: int = 1 << 20) -> torch.optim.Optimizer:
    """Put our LoRA on the model; the optimizer has paged states of 8 bits."""
    adapter = reparam.attach(model, reparam.LoRA(r=R, alpha=ALPHA), targets="all-linear")
    return PagedAdamW(adapter.parameters(), lr=LR, bits=8, budget=budget, page=page)


def theirs(model: nn.Module) -> torch.optim.Optimizer:
    """The same from PEFT and bitsandbytes."""
    model.is_loaded_in_4bit = True  # what transformers sets when it quantizes, and PEFT asks for
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(m.LINEARS))
    trained = [p for p in peft.get_peft_model(model, config).parameters() if p.requires_grad]
    return bnb.optim.PagedAdamW8bit(trained, lr=LR)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, *, autocast: bool = False) -> m.Call:
    """A training step on `ids`. With autocast, which PEFT needs for its float32 factors to meet bfloat16 cheaply."""

    def call() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
