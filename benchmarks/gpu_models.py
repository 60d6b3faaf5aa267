"""Models for the GPU benchmark: Llama shapes with random weights in NF4, by reparam or bitsandbytes, or dense.

The model is made on the meta device, without memory. Then each linear layer in turn gets a random bfloat16 matrix on
the device, which is quantized and freed, so that at most one quantized matrix is dense at a time. LoRA is on all linear
layers of the blocks, as in QLoRA (arXiv 2305.14314, §4), with gradient checkpointing. Shapes: O out_features, I
in_features.
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
    """reparam's linear layer with `w` [O, I] in NF4 as in QLoRA; `module` has no weights in memory."""
    return Linear(module, reparam.NF4().quantize(w))


def dense(module: nn.Linear, w: Tensor) -> nn.Module:
    """The module itself with `w` [O, I] as its frozen weight."""
    module.weight = nn.Parameter(w, requires_grad=False)
    return module


def bitsandbytes_nf4(module: nn.Linear, w: Tensor) -> nn.Module:
    """bitsandbytes' linear layer with `w` [O, I] in NF4; moving its parameter to a device quantizes it."""
    sizes = module.in_features, module.out_features
    quantized = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=w.dtype, quant_type="nf4", device="meta")
    parameter = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", module=quantized)
    quantized.weight = parameter.to(w.device)
    return quantized


def build(shape: m.Shape, device: torch.device, make: Make) -> nn.Module:
    """A frozen bfloat16 model of this shape; `make` makes each linear layer from an empty module and a matrix."""
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
    with device:  # its buffers are computed, not trained
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # embeddings, norms and the head
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Parameter(random(parameter, device), requires_grad=False))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def random(like: Tensor, device: torch.device) -> Tensor:
    """Ones for a vector (a norm's weight), and normal numbers with standard deviation 0.02 for a matrix."""
    fresh = torch.empty(like.shape, dtype=like.dtype, device=device)
    return fresh.fill_(1) if like.ndim == 1 else fresh.normal_(0, 0.02)


def ours(model: nn.Module, *, budget: int | None = None, page: int = 1 << 20) -> torch.optim.Optimizer:
    """Attach reparam's LoRA and return its optimizer with paged 8-bit states; `budget` and `page` are bytes."""
    adapter = reparam.attach(model, reparam.LoRA(r=R, alpha=ALPHA), targets="all-linear")
    return PagedAdamW(adapter.parameters(), lr=LR, bits=8, budget=budget, page=page)


def theirs(model: nn.Module) -> torch.optim.Optimizer:
    """Attach PEFT's LoRA and return bitsandbytes' optimizer with paged 8-bit states."""
    model.is_loaded_in_4bit = True  # transformers sets this when it quantizes, and PEFT reads it
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(m.LINEARS))
    trained = [p for p in peft.get_peft_model(model, config).parameters() if p.requires_grad]
    return bnb.optim.PagedAdamW8bit(trained, lr=LR)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, *, autocast: bool = False) -> m.Call:
    """A training step on `ids`; PEFT needs autocast for fast products of its float32 factors with bfloat16 inputs."""

    def call() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
