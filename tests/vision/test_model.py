"""A decoder that sees: the image mask, the places of images, generation, the start, and merging."""

import models
import pytest
import torch
from seeing import METHOD, MODELS, VISION, WINDOW, batch, decoder, scrambled, seeing
from torch import Tensor, nn

import reparam
from reparam import DoRA, LoRA
from reparam.vision import PatchEmbedding, Vision, VoRA
from reparam.vision.mask import image_mask
from reparam.vision.placing import check_places


def formula(valid: Tensor, images: Tensor, window: int | None = None) -> Tensor:
    """The mask of the specification, [B, L, L], written out with loops."""
    rows, length = valid.shape
    allow = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        for i in range(length):
            for j in range(length):
                before = j <= i and (window is None or i - j < window)
                same = images[b, i] >= 0 and images[b, i] == images[b, j]
                allow[b, i, j] = bool(valid[b, j]) and bool(before or same)
    return allow


def layouts(seed: int) -> tuple[Tensor, Tensor]:
    """Rows with up to three images at random places, some adjacent, padded on either side: valid and images."""
    draw = torch.Generator().manual_seed(seed)
    valid, images = torch.ones(4, 14, dtype=torch.long), torch.full((4, 14), -1)
    number = 0
    for row in range(4):
        at = 0
        for _ in range(3):
            gap, length = (int(torch.randint(low, 4, (), generator=draw)) for low in (0, 1))
            if at + gap + length <= 14:
                images[row, at + gap : at + gap + length] = number
                at, number = at + gap + length, number + 1
        if row == 1:
            valid[row, :2], images[row, :2] = 0, -1
        if row == 2:
            valid[row, -2:], images[row, -2:] = 0, -1
    return valid, images


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(3))
def test_the_mask_is_that_of_the_formula(attention: str, seed: int) -> None:
    valid, images = layouts(seed)
    embeds = torch.zeros(4, 14, 32)
    for name, windows in {"llama": [None], "mistral": [WINDOW], "gemma3": [WINDOW, None]}.items():
        made = image_mask(decoder(name, attention=attention), embeds, valid, images)
        found = list(made.values()) if isinstance(made, dict) else [made]
        allowed = [mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0 for mask in found]
        wanted = [formula(valid, images, window) for window in windows]
        real = valid.bool()  # what padding sees has no effect
        assert len(found) == len(windows)
        assert all(any(torch.equal(a[real], w[real]) for a in allowed) for w in wanted), (name, attention)


def test_permuted_rows_have_permuted_masks() -> None:
    valid, images = layouts(7)
    order = torch.tensor([3, 1, 0, 2])
    model, embeds = decoder(attention="eager"), torch.zeros(4, 14, 32)
    first = image_mask(model, embeds, valid, images)
    assert torch.equal(image_mask(model, embeds, valid[order], images[order]), first[order])


@pytest.mark.parametrize("name", MODELS)
def test_text_alone_equals_the_base_at_the_start(name: str) -> None:
    model = decoder(name)
    before = models.logits(model)
    vora = seeing(model)
    with torch.no_grad():
        assert torch.equal(vora(models.IDS).logits, before)
    names = [path for path in vora.adapter.sites if ".2." in path]
    assert names == []  # the third block has no adapter
    if name != "gpt2":
        assert len(vora.adapter.sites) == 7 * 2


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_batch_and_padding(name: str) -> None:
    """The first row has two adjacent images, and padding on the left; then the same on the right."""
    vora, given = scrambled(seeing(decoder(name))), batch()
    right = [torch.cat([part[:1].roll(-3, 1), part[1:]]) for part in (given.ids, given.images, given.valid)]
    with torch.no_grad():
        alone = vora(given.ids[:1, 3:], pixel_values=given.pixels[:2], image_ids=given.images[:1, 3:]).logits
        left = vora(given.ids, **given.inputs()).logits
        moved = vora(right[0], pixel_values=given.pixels, image_ids=right[1], attention_mask=right[2]).logits
    assert torch.allclose(left[0, 3:], alone[0], atol=2e-5)
    assert torch.allclose(moved[0, :-3], alone[0], atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_equals_full_recomputation(name: str) -> None:
    vora, given = scrambled(seeing(decoder(name))), batch()
    ids, images, valid = given.ids, given.images, given.valid
    with torch.no_grad():
        for _ in range(5):
            inputs = {"pixel_values": given.pixels, "image_ids": images, "attention_mask": valid}
            following = vora(ids, **inputs).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
            images = torch.cat([images, torch.full_like(following, -1)], 1)
            valid = torch.cat([valid, torch.ones_like(following)], 1)
    found = vora.generate_ids(given.ids, **given.inputs(), max_new_tokens=5, do_sample=False)
    assert torch.equal(found, ids)


def test_a_prompt_that_ends_with_an_image_beams_and_no_cache() -> None:
    vora, given = scrambled(seeing()), batch()
    ends = {"pixel_values": given.pixels[:2], "image_ids": given.images[:1, :15]}
    with torch.no_grad():
        following = vora(given.ids[:1, :15], **ends).logits[0, -1].argmax()
    assert vora.generate_ids(given.ids[:1, :15], **ends, max_new_tokens=1)[0, -1] == following
    settings = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with_cache = vora.generate_ids(given.ids, **given.inputs(), **settings)
    assert torch.equal(vora.generate_ids(given.ids, **given.inputs(), **settings, use_cache=False), with_cache)


def test_the_mask_of_flex_attention_is_that_of_the_formula() -> None:
    """The function that its kernel is made from; it is not compiled, which takes longer than all other tests here."""
    valid, images = layouts(0)
    with torch._dynamo.config.patch(disable=True):
        made = image_mask(decoder(attention="flex_attention"), torch.zeros(4, 14, 32), valid, images)
    rows, queries, keys = torch.meshgrid(torch.arange(4), torch.arange(14), torch.arange(14), indexing="ij")
    found = made.mask_mod(rows, torch.tensor(0), queries, keys)
    assert torch.equal(found[valid.bool()], formula(valid, images)[valid.bool()])


def test_later_text_does_not_change_images_and_images_see_all_of_themselves() -> None:
    """Text after an image leaves its states as they are; a change of its last patch reaches its first one."""
    vora, given = scrambled(seeing()), batch()
    changed = given.ids.clone()
    changed[1, 8:] = 5
    other = [*given.pixels[:2], given.pixels[2].clone()]
    other[2][:, -2:, -2:] += 1
    states = []
    for ids, pixels in ((given.ids, given.pixels), (changed, given.pixels), (given.ids, other)):
        with torch.no_grad():
            inputs = {**given.inputs(), "pixel_values": pixels}
            states.append(vora(ids, **inputs, output_hidden_states=True).hidden_states[-1][1, 2:8])
    assert torch.allclose(states[0], states[1], atol=1e-6)
    assert (states[0][0] - states[2][0]).abs().max() > 1e-3


@pytest.mark.parametrize("mask", ["image", "causal"])
def test_the_order_of_patches_matters_only_to_the_causal_mask(mask: str) -> None:
    """Without rotary positions, patches that are permuted with their positions leave the text after them the same."""
    vora = scrambled(seeing(mask=mask))
    vora.language.model.rotary_emb.inv_freq.zero_()
    draw = torch.Generator().manual_seed(2)
    order = torch.randperm(16, generator=draw)
    image = torch.rand(3, 8, 8, generator=draw)
    patches = image.unfold(1, 2, 2).unfold(2, 2, 2).reshape(3, 16, 2, 2)
    permuted = patches[:, order].reshape(3, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(3, 8, 8)
    ids, images = torch.randint(2, 97, (1, 20), generator=draw), torch.full((1, 20), -1)
    images[0, 1:17] = 0
    with torch.no_grad():
        first = vora(ids, pixel_values=[image], image_ids=images).logits[0, 17:]
        vora.embedding.positions.copy_(vora.embedding.positions[:, order])
        second = vora(ids, pixel_values=[permuted], image_ids=images).logits[0, 17:]
    assert torch.allclose(first, second, atol=1e-4) == (mask == "image")


STORAGES = {"dense": None, "nf4": "nf4"}


@pytest.mark.parametrize(
    "method", [METHOD, DoRA(r=4), LoRA(r=4, rank_pattern={"q_proj": 2})], ids=["lora", "dora", "ranks"]
)
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_merged_equals_unmerged(method: reparam.Method, storage: str) -> None:
    model = models.llama(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    size = sum(p.numel() for p in model.parameters())
    if storage == "nf4":
        reparam.quantize(model, "nf4")
    vora, given = scrambled(seeing(model, blocks=1, method=method)), batch()
    with torch.no_grad():
        before = vora(given.ids, **given.inputs()).logits[given.valid.bool()]
        vora.merge()
        after = vora(given.ids, **given.inputs()).logits[given.valid.bool()]
    assert torch.allclose(before, after, atol=1e-3 * float(before.abs().max()))
    assert vora.adapter is None
    if storage == "dense":
        found = sum(p.numel() for p in vora.parameters())
        assert found == size + sum(p.numel() for p in vora.embedding.parameters())


def test_only_the_adapter_and_the_embedding_get_gradients() -> None:
    vora, given = seeing().train(), batch()
    labels = given.ids.masked_fill((given.images >= 0) | (given.valid == 0), -100)
    vora(given.ids, **given.inputs(), labels=labels).loss.backward()
    having = {name for name, p in vora.named_parameters() if p.grad is not None}
    assert {id(p) for p in vora.trained().values()} == {id(p) for n, p in vora.named_parameters() if n in having}
    assert not any("frozen" in name or "embed_tokens" in name or "lm_head" in name for name in having)


def test_the_loss_is_that_of_text_positions() -> None:
    vora, given = scrambled(seeing()), batch()
    labels = given.ids.masked_fill((given.images >= 0) | (given.valid == 0), -100)
    with torch.no_grad():
        found = vora(given.ids, **given.inputs(), labels=labels)
    wanted = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(found.loss, wanted)


def test_sizes_of_the_published_model() -> None:
    vision = Vision()
    with torch.device("meta"):
        embedding = PatchEmbedding(vision, hidden=3584)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in embedding.named_children()}
    assert counts == {"conv": 904_704, "norm": 1_536, "out": 5_505_024}
    assert embedding.positions.numel() == 1_572_864
    assert vision.grid(torch.empty(3, 448, 448)) == (32, 32)


def test_positions() -> None:
    """The table itself at its own size; a constant stays constant; height and width are not mixed up."""
    embedding = PatchEmbedding(VISION, hidden=8)
    assert embedding.at(4, 4) is embedding.positions
    with torch.no_grad():
        rows = torch.arange(4.0).repeat_interleave(4)  # the number of the row of each patch
        embedding.positions.copy_(torch.stack([torch.full((16,), 3.0), *[rows] * 11], 1))
        found = embedding.at(4, 6)[0]
    assert torch.equal(found[:, 0], torch.full((24,), 3.0))
    assert torch.allclose(found[:, 1], torch.arange(4.0).repeat_interleave(6))


def test_the_embedding_equals_plain_torch() -> None:
    embedding = PatchEmbedding(VISION, hidden=8).double()
    image = torch.rand(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = image.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).reshape(16, 12)
    hidden = patches @ embedding.conv.weight.flatten(1).T + embedding.conv.bias
    hidden = hidden / (hidden.square().mean(1, keepdim=True) + 1e-5).sqrt() * embedding.norm.weight
    wanted = (hidden + embedding.positions[0]) @ embedding.out.weight.T
    assert torch.allclose(embedding([image])[0], wanted, atol=1e-12)


def test_the_seed_gives_the_embedding() -> None:
    first, second, other = (seeing(seed=seed).embedding.out.weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_places_that_do_not_fit() -> None:
    row = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    check_places(row, [2, 2])
    for images, counts, labels, told in (
        (row, [2], None, "places for 2 images"),
        (row, [2, 2, 2], None, "3 images are given"),
        (row, [2, 3], None, "image 1 has 3 tokens, and row 0 has 2 places"),
        (torch.tensor([[0, -1, 0]]), [2], None, "several pieces"),
        (torch.tensor([[1, 1, 0]]), [1, 2], None, "order"),
        (torch.tensor([[-1, 1]]), [1], None, "numbered"),
        (row, [2, 2], torch.tensor([[-100, -100, 5, 5, -100, -100]]), "row 0 has a label at the token of an image"),
    ):
        with pytest.raises(ValueError, match=told):
            check_places(images, counts, labels)


def test_what_cannot_be_made() -> None:
    encoder, given = models.t5(), batch()
    for make, told in (
        (lambda: seeing(blocks=4), "has 3 blocks"),
        (lambda: seeing(blocks=0), "has 3 blocks"),
        (lambda: seeing(mask="both"), "'image' or 'causal'"),
        (lambda: seeing(method=reparam.MoLoRA(r=2)), "cannot be merged"),
        (lambda: seeing(encoder), "encoder-decoder"),
        (lambda: seeing(targets=["lm_head"]), "selects nothing"),
        (lambda: Vision(patch=14, size=20), "not a multiple"),
        (lambda: Vision(std=(0.0,)), "above 0"),
        (lambda: seeing()(given.ids, pixel_values=given.pixels), "without image_ids"),
        (
            lambda: seeing()(given.ids, pixel_values=[torch.rand(1, 4, 4)], image_ids=given.images),
            "image 0 has the shape",
        ),
        (lambda: seeing()(given.ids, pixel_values=[torch.rand(3, 4, 5)], image_ids=given.images), "4 x 5 pixels"),
        (lambda: seeing()(torch.ones(1, 65, dtype=torch.long)), "context of the model is 64"),
        (lambda: seeing(method=None).merge(), "no vision adapter"),
    ):
        with pytest.raises(ValueError, match=told):
            make()


def test_a_method_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = decoder()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="cannot be merged"):
        VoRA(model, vision=VISION, method=reparam.MoLoRA(r=2))
    assert [name for name, _ in model.named_modules()] == names
    assert not reparam.adapters(model)
