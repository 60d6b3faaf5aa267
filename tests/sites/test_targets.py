"""Targets: keywords, path suffixes, patterns; and modules that are refused with an error."""

import re
from typing import Any

import models
import pytest
import torch
from models import logits
from torch import nn

import reparam
from reparam.sites import targets
from reparam.sites.embedding import Embedding
from reparam.sites.experts import opened
from reparam.sites.linear import Linear


def resolve(model: nn.Module, *wanted: str) -> list[str]:
    return targets.resolve(model, list(wanted))


def ends(paths: list[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPECTED = {  # model -> (ends, number) for attention, mlp, and what all-linear has beyond the two
    "llama": ((ATTENTION, 8), (MLP, 6), set()),
    "tied_llama": ((ATTENTION, 8), (MLP, 6), set()),
    "gpt2": (({"c_attn", "c_proj"}, 4), ({"c_fc", "c_proj"}, 4), set()),
    "bert": (({"query", "key", "value", "dense"}, 8), ({"dense"}, 4), {"bert.pooler.dense"}),
    "t5": ((set("qkvo"), 24), ({"wi", "wo"}, 8), set()),
    "qwen_moe": ((ATTENTION, 8), ({*MLP, "gate_up_proj", "shared_expert_gate"}, 24), set()),
}
WORDS = [word for word in targets.KEYWORDS if word not in ("experts", "router")]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.filterwarnings("ignore:targets. skipped .*(experts|shares its weight)")
def test_the_words_on_every_model(name: str) -> None:
    model = models.ALL[name]()
    (attention, of_attention), (mlp, of_mlp), beyond = EXPECTED[name]
    found = {word: resolve(model, word) for word in WORDS}
    assert (ends(found["attention"]), len(found["attention"])) == (attention, of_attention)
    assert (ends(found["mlp"]), len(found["mlp"])) == (mlp, of_mlp)
    assert not set(found["attention"]) & set(found["mlp"])
    assert set(found["all-linear"]) - set(found["attention"]) - set(found["mlp"]) == beyond
    assert not {"lm_head", "classifier"} & ends(found["all-linear"])
    with opened(model):
        order = [path for path, _ in model.named_modules() if path in found["all-linear"]]
    assert found["all-linear"] == order


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.filterwarnings("ignore:targets. skipped .*(experts|shares its weight)")
def test_every_site_of_a_word_is_reached_by_the_forward(name: str, word: str) -> None:
    model = models.ALL[name]()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=word)
    models.scores(model).square().sum().backward()
    assert [n for n, p, _ in adapter.named_parameters() if n.endswith("B") and not p.grad.any()] == []  # type: ignore[union-attr]


def test_a_path_the_end_of_a_path_and_lists_of_both() -> None:
    model = models.llama()
    assert resolve(model, "q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert resolve(model, "1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    assert resolve(model, "lm_head") == ["lm_head"]
    assert resolve(model, "embed_tokens") == ["model.embed_tokens"]
    both = resolve(model, "v_proj", "model.layers.0.mlp.up_proj", "q_proj")
    assert len(both) == 5
    assert both == [path for path, _ in model.named_modules() if path in both]
    assert targets.resolve(model, "attention") == resolve(model, *ATTENTION)
    assert len(resolve(model, "all-linear", "lm_head")) == 15
    with pytest.raises(ValueError, match="'_proj' matches no module"):
        resolve(model, "_proj")


def test_a_regular_expression_is_for_the_whole_path_and_for_what_can_be_adapted() -> None:
    model = models.llama()
    assert resolve(model, r"re:.*layers\.1\..*_proj") == [p for p in resolve(model, "all-linear") if ".1." in p]
    assert resolve(model, "re:.*(head|tokens)") == ["model.embed_tokens", "lm_head"]
    assert len(resolve(model, "re:.*")) == 16  # not the blocks and norms that it matches as well
    with pytest.raises(ValueError, match=r"'re:q_proj' matches no module"):
        resolve(model, "re:q_proj")
    with pytest.raises(ValueError, match=r"'\(q' is not a valid regular expression: missing \)"):
        resolve(model, "re:(q")


def test_no_match_names_the_nearest_and_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'q_prj' matches no module \(did you mean 'q_proj'.*\)") as caught:
        resolve(models.llama(), "q_prj")
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    with pytest.raises(ValueError, match=r"did you mean 'c_attn'"):
        resolve(models.gpt2(), "c_atn")
    with pytest.raises(ValueError, match="no targets were given"):
        resolve(models.llama())


def test_all_problems_are_told_at_once_and_nothing_is_touched() -> None:
    model = models.llama()
    before = str(model)
    with pytest.raises(
        ValueError, match=r"'a_proj' matches.*'re:b' matches.*model\.rotary_emb: LlamaRotaryEmbedding is not"
    ):
        reparam.attach(model, reparam.LoRA(), targets=["q_proj", "a_proj", "re:b", "rotary_emb"])
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_that_is_no_linear_map_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp: GPT2MLP is not supported; adapters support"):
        resolve(models.gpt2(), "0.mlp")
    with pytest.raises(ValueError, match="Conv2d is not supported"):
        resolve(nn.Sequential(nn.Conv2d(1, 1, 1)), "0")
    with pytest.raises(ValueError, match="'all-linear' matches no module"):
        resolve(nn.Sequential(nn.Conv1d(1, 1, 1)), "all-linear")  # torch's, not GPT-2's


# ---- weights that updates cannot reach


class Stacked(nn.Module):
    """A module with a three-dimensional weight, of no class that reparam knows."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.codes = nn.Parameter(torch.zeros(3, 4, 5))


def test_an_unknown_stack_of_weights_is_named_with_its_share() -> None:
    model = nn.ModuleList([Stacked()])
    with pytest.warns(UserWarning, match=r"skipped 0\.codes \(a fused weight \[3, 4, 5\]\)") as caught:
        adapter = reparam.attach(model, reparam.LoRA(r=1))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "(75.0 % of the model's parameters)" in str(caught[0].message)  # 60 of 60 + 16 + 4
    assert list(adapter.sites) == ["0.project"]


@pytest.mark.parametrize("name", ["mixtral", "qwen_moe"])
def test_where_experts_are_not_asked_for_nothing_is_said(name: str, recwarn: pytest.WarningsRecorder) -> None:
    resolve(models.ALL[name](), "attention")
    resolve(models.ALL[name](), "q_proj", "re:.*v_proj")
    assert not recwarn.list


def test_experts_that_cannot_be_adapted_are_named_with_the_reason() -> None:
    model = models.mixtral()
    for layer in model.model.layers:
        layer.mlp.experts.forward = lambda *args: args[0]
    with pytest.raises(ValueError, match=r"'mlp' matches no.*gate_up_proj \(a fused weight \[4, 96, 32\]: the forward"):
        resolve(model, "mlp")


def test_words_for_experts_and_routers() -> None:
    model = models.qwen_moe()
    shape = str(model)
    assert resolve(model, "router") == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    three = [f"model.layers.{i}.mlp.experts.3.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert resolve(model, "experts.3") == three
    assert resolve(model, r"re:.*\.experts\.3\..*") == three
    routed = [path for path in resolve(model, "all-linear") if ".experts." in path]
    assert resolve(model, "mlp.experts") == routed
    assert len(routed) == 16
    shared = resolve(model, *(f"shared_expert.{name}" for name in MLP))
    assert set(resolve(model, "experts")) == {*routed, *shared}
    assert not {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} & set(resolve(model, "everything"))
    assert str(model) == shape
    with pytest.raises(ValueError, match="'experts' matches no module: this model is no mixture of experts"):
        resolve(models.llama(), "experts")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_models_without_experts_are_not_warned_about(name: str, recwarn: pytest.WarningsRecorder) -> None:
    resolve(models.ALL[name](), "all-linear", "attention", "mlp")
    resolve(nn.Sequential(nn.Conv1d(2, 3, 4), nn.Linear(2, 2), nn.Bilinear(2, 3, 4)), "all-linear")
    assert not recwarn.list


class Doubled(nn.Linear):
    """A subclass of Linear that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3))
    with pytest.raises(ValueError, match=r"1: Doubled overrides nn\.Linear\.forward, which an update would bypass"):
        resolve(model, "1")
    with pytest.warns(UserWarning, match=r"skipped 1 \(Doubled overrides"):
        assert resolve(model, "all-linear") == ["0"]


def test_a_subclass_without_one_is_a_linear_map() -> None:
    class Named(nn.Linear):
        pass

    model = nn.Sequential(Named(3, 3))
    before = str(model)
    reparam.attach(model, reparam.LoRA(r=1))
    reparam.remove(model, "default")
    assert str(model) == before


def test_a_forward_set_on_the_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(4, 3))
    model[0].forward = model[0].forward  # type: ignore[method-assign]  # as accelerate leaves it after its hooks
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    model[2].forward = lambda x: x  # type: ignore[method-assign]
    assert resolve(model, "0") == ["0"]
    with pytest.raises(ValueError, match=r"1: Linear has a patched forward.*2: Embedding has a patched forward"):
        resolve(model, "1", "2")


def test_the_output_of_torchs_attention_is_refused() -> None:
    """torch's attention reads the weight of `out_proj` and never calls the module."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj: nn\.MultiheadAttention reads the weight"):
        resolve(model, "out_proj")
    with pytest.warns(UserWarning, match=r"self_attn\.out_proj \(nn\.MultiheadAttention"):
        assert resolve(model, "all-linear") == ["linear1", "linear2"]


def test_embeddings_that_are_more_than_a_lookup_are_refused() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids + 2)

    model = nn.ModuleDict({"a": Shifted(3, 4), "b": nn.Embedding(3, 4, max_norm=1.0), "c": nn.EmbeddingBag(3, 4)})
    with pytest.raises(ValueError, match=r"a: Shifted overrides.*b: Embedding has max_norm.*c: EmbeddingBag is not"):
        resolve(model, "a", "b", "c")


def test_wrapping_alone_refuses_as_well() -> None:
    with pytest.raises(ValueError, match="ReLU is not a linear map"):
        Linear.wrap(nn.ReLU())
    with pytest.raises(ValueError, match="Linear is not an embedding"):
        Embedding.wrap(nn.Linear(2, 2))


# ---- tied weights


def test_tied_weights_are_refused_on_either_side() -> None:
    model = models.tied_llama()
    before = str(model)
    for target, other in (("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")):
        with pytest.raises(ValueError, match=rf"{target} shares its weight with {re.escape(other)}.*reparam\.untie"):
            reparam.attach(model, reparam.LoRA(), targets=[target])
        with pytest.raises(ValueError, match=rf"{target} shares its weight with {re.escape(other)}"):
            reparam.attach(model, reparam.LoRA(), modules_to_save=[target])
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reparam.attach(model, reparam.LoRA())  # all-linear leaves both alone
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_weights_are_adapted_apart() -> None:
    model = models.tied_llama()
    base = logits(model)
    reparam.untie(model)
    assert torch.equal(logits(model), base)
    assert model.config.tie_word_embeddings is False
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["lm_head"])
    nn.init.normal_(adapter.updates["lm_head"].B)  # type: ignore[arg-type]
    before = model.model.embed_tokens.weight.clone()
    reparam.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)
    assert not torch.allclose(logits(model), base)


def test_untying_twice_or_without_ties_changes_nothing() -> None:
    for model in (models.tied_llama(), models.llama(), models.gpt2(tied=True)):
        reparam.untie(model)
        state = models.frozen(model)
        reparam.untie(model)
        assert models.same(models.frozen(model), state)


def test_an_embedding_that_two_stacks_read_is_refused() -> None:
    """T5's encoder and decoder."""
    with pytest.raises(ValueError, match=r"shared shares its weight with encoder\.embed_tokens, decoder\.embed_tokens"):
        reparam.attach(models.t5(), reparam.LoRA(), targets=["shared"])


# ---- kinds of layers in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conv1d_is_transposed_once_and_back_without_a_change_of_any_bit(dtype: torch.dtype) -> None:
    model = models.gpt2().to(dtype)
    state, base = models.frozen(model), logits(model)
    held = model.transformer.h[0].attn.c_attn.weight.data_ptr()
    adapter = reparam.attach(model, reparam.LoRA(r=2))
    site = adapter.sites["transformer.h.0.attn.c_attn"]
    assert (site.out_features, site.in_features) == (96, 32)
    assert torch.equal(logits(model), base)
    assert adapter.modules[site.name].frozen.tensor().data_ptr() == held  # nothing was copied
    reparam.remove(model, "default")
    assert models.same(models.frozen(model), state)
    assert torch.equal(logits(model), base)


def test_the_parameter_of_a_linear_map_is_shared_not_copied() -> None:
    model = models.llama()
    held = {p.data_ptr() for p in model.parameters()}
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["all-linear", "embed_tokens"])
    own = {p.data_ptr() for p in adapter.parameters()}
    assert {p.data_ptr() for p in model.parameters()} == held | own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_kept_in_float32_gets_its_input_in_float32(dtype: torch.dtype) -> None:
    """transformers keeps T5's `wo` in float32 in a 16-bit model, and casts its input if it is a plain layer."""
    model: Any = models.t5().to(dtype)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    with torch.no_grad():
        base = logits(model)
        adapter = reparam.attach(model, reparam.LoRA(r=2))
        assert torch.equal(logits(model), base)
    assert logits(model).dtype == dtype
    models.scores(model).float().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_flags_and_modes_of_the_model_are_kept() -> None:
    model = models.llama().train()
    model.lm_head.eval()
    adapter = reparam.attach(model, reparam.LoRA(dropout=0.5), targets=["all-linear", "lm_head"])
    modes = {site: update.training for site, update in adapter.updates.items()}
    assert modes.pop("lm_head") is False
    assert all(modes.values())
    assert model.dtype == torch.float32
    assert model.get_input_embeddings() is model.model.embed_tokens
    reparam.remove(model, "default")
    assert model.lm_head.training is False
    assert model.model.layers[0].self_attn.q_proj.training is True


def test_modules_to_save_may_be_one_name() -> None:
    adapter = reparam.attach(models.bert(), reparam.LoRA(r=2), modules_to_save="classifier")
    assert list(adapter.replaced) == ["classifier"]
    with pytest.raises(ValueError, match=r"modules_to_save: 'clasifier' matches no module \(did you mean 'classifier'"):
        reparam.attach(models.bert(), reparam.LoRA(r=2), modules_to_save=["clasifier"])
