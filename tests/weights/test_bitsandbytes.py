"""Files of bitsandbytes in 4 bits: read and written byte for byte, and refused where they are damaged.

The folder in `golden/` was written by bitsandbytes 0.50.2 (`python tests/test_bitsandbytes.py` does it again), so
that the format is tested without it. If bitsandbytes is installed, results are also compared with it, where its CPU
kernels are right: the last dimension is a multiple of the block, and nothing is computed before a save.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GPT2Config, GPT2LMHeadModel, build, llama
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from reparam import NF4, FormatError, quantize
from reparam.errors import BaseError
from reparam.hf.models import load_base, save_model
from reparam.weights.bitsandbytes import FP4, NESTED, STATE, tensors_of_weight, weight_from
from reparam.weights.nf4 import NF4Weight

GOLDEN = Path(__file__).parents[1] / "golden" / "bitsandbytes_nf4"
DEQUANTISED = "b22ec10d819fd1fc3a97695ae46000bad3cda7448fcb60accbad2f616e32e5d5"  # by bitsandbytes, in bf16
W = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
State = dict[str, Tensor]


def tensors(folder: Path) -> State:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def equal(one: State, other: State) -> bool:
    """Whether names, dtypes, shapes and bytes are equal."""
    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and a.shape == other[k].shape and torch.equal(raw(a), raw(other[k]))
        for k, a in one.items()
    )


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def small(**changes: Any) -> Any:
    """A Llama whose matrix rows are multiples of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return llama(**{**sizes, "num_key_value_heads": 1, "vocab_size": 16, **changes})


def digest(matrices: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for path, matrix in sorted(matrices.items()):
        found.update(path.encode() + matrix.float().numpy().tobytes())
    return found.hexdigest()


def ours(model: Any) -> dict[str, Tensor]:
    """All quantized matrices of a reparam model, dequantized."""
    quantized = (item for item in model.named_modules() if isinstance(getattr(item[1], "frozen", None), NF4Weight))
    return {path: module.frozen.tensor() for path, module in quantized}


def theirs(model: Any) -> dict[str, Tensor]:
    """All quantized matrices of a bitsandbytes model, dequantized."""
    bnb = pytest.importorskip("bitsandbytes")
    layers = {path: module.weight for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    return {path: bnb.functional.dequantize_4bit(w.data, w.quant_state) for path, w in layers.items()}


# ---- the golden folder, without bitsandbytes


def test_a_folder_of_bitsandbytes_is_read_without_it_and_written_byte_for_byte(tmp_path: Path) -> None:
    model = load_base(str(GOLDEN))
    report = model.hf_quantizer.report
    assert len(report.sites) == 7
    assert report.storage == NF4()
    assert model.dtype == model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert digest(ours(model)) == DEQUANTISED
    save_model(model, None, tmp_path / "ours", format="bitsandbytes")
    assert equal(tensors(tmp_path / "ours"), tensors(GOLDEN))
    entry = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    theirs = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]
    assert {**entry, "llm_int8_skip_modules": None} == theirs


def test_both_formats_hold_the_same_tensors(tmp_path: Path) -> None:
    model = load_base(str(GOLDEN))
    save_model(model, None, tmp_path / "ours")
    assert equal(tensors(tmp_path / "ours"), tensors(GOLDEN))
    entry = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    settings = {"quant_method": "reparam", "storage": "nf4", "block": 64, "double": True, "targets": ["all-linear"]}
    assert entry == settings
    again = load_base(str(tmp_path / "ours"))
    assert digest(ours(again)) == DEQUANTISED


def test_another_dtype_changes_the_results_and_not_the_codes() -> None:
    model, other = load_base(str(GOLDEN)), load_base(str(GOLDEN), dtype="float32")
    assert other.dtype == other.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert digest(ours(other)) != digest(ours(model))
    assert digest({path: matrix.bfloat16() for path, matrix in ours(other).items()}) == DEQUANTISED


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "LLM.int8"),
        ({"bnb_4bit_quant_type": "fp4"}, "FP4"),
    ],
)
def test_what_is_not_nf4_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match=said) as error:
        load_base(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_quantized_although_it_says_so(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    with pytest.raises(BaseError, match="no matrix is quantized"):
        load_base(str(tmp_path))


# ---- one weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("storage", [NF4(), NF4(double=False), NF4(128), NF4(4096), NF4(32, double=False)])
def test_a_weight_survives_its_tensors(storage: NF4, dtype: torch.dtype) -> None:
    weight = storage.quantize(W.to(dtype))
    state = tensors_of_weight(weight, "a.b")
    again = weight_from(state, "a.b")
    assert again.storage == storage
    assert again.dtype == dtype
    assert again.map is None
    assert equal(dict(again.named_parameters()), dict(weight.named_parameters()))
    assert equal(tensors_of_weight(again, "a.b"), state)


def test_an_odd_number_of_entries() -> None:
    state = tensors_of_weight(NF4(32).quantize(W[:5, :7]), "a")
    assert list(state["a.weight"].shape) == [18, 1]
    assert equal(tensors_of_weight(weight_from(state, "a"), "a"), state)


def test_a_map_of_its_own_is_kept() -> None:
    state = tensors_of_weight(NF4().quantize(W), "a")
    own = state[f"a.{NESTED[1]}"].clone()
    own[200] = torch.nextafter(own[200], torch.tensor(1.0))
    state[f"a.{NESTED[1]}"] = own
    weight = weight_from(state, "a")
    assert weight.map is not None
    assert equal(tensors_of_weight(weight, "a"), state)


@pytest.mark.parametrize("holder", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_bytes_in_another_dtype(holder: torch.dtype) -> None:
    state = tensors_of_weight(NF4().quantize(W), "a")
    held = {**state, "a.weight": state["a.weight"].view(-1).view(holder).view(-1, 1)}
    assert equal(tensors_of_weight(weight_from(held, "a"), "a"), state)


def test_tensors_of_a_file_are_not_copied() -> None:
    state = tensors_of_weight(NF4().quantize(W), "a")
    assert weight_from(state, "a").codes.data_ptr() == state["a.weight"].data_ptr()


def said(**changes: Any) -> Callable[[State], None]:
    """Edit the JSON; None removes a key."""

    def change(state: State) -> None:
        values = json.loads(bytes(state[f"a.{STATE}"].tolist())) | changes
        text = json.dumps({key: value for key, value in values.items() if value is not None})
        state[f"a.{STATE}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def put(key: str, tensor: Tensor | None) -> Callable[[State], None]:
    """Replace a tensor; None removes it."""

    def change(state: State) -> None:
        state.pop(f"a.{key}", None)
        if tensor is not None:
            state[f"a.{key}"] = tensor

    return change


NESTED_STATE = tensors_of_weight(NF4().quantize(W), "a")
MAP, QUANT_MAP = NESTED_STATE[f"a.{NESTED[1]}"], NESTED_STATE["a.weight.quant_map"]
DAMAGE: dict[str, tuple[Callable[[State], None], str]] = {
    "FP4": (put(FP4, torch.zeros(4, dtype=torch.uint8)), "FP4"),
    "two states": (put(FP4, NESTED_STATE[f"a.{STATE}"]), "FP4"),
    "no state": (put(STATE, None), "quant_state"),
    "state of floats": (put(STATE, torch.zeros(4)), "uint8"),
    "not UTF-8": (put(STATE, torch.tensor([0xFF, 0xFE], dtype=torch.uint8)), "UTF-8"),
    "not JSON": (put(STATE, torch.tensor(list(b"{"), dtype=torch.uint8)), "JSON"),
    "deep JSON": (put(STATE, torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)), "JSON"),
    "a list": (put(STATE, torch.tensor(list(b"[]"), dtype=torch.uint8)), "object"),
    "unknown key": (said(extra=1), "extra"),
    "no shape": (said(shape=None), "shape"),
    "no dtype": (said(dtype=None), "dtype"),
    "other type": (said(quant_type="fp4"), "quant_type"),
    "other dtype": (said(dtype="int8"), "dtype"),
    "block of 63": (said(blocksize=63), "blocksize"),
    "block of true": (said(blocksize=True), "blocksize"),
    "another block": (said(blocksize=128), "absmax"),
    "nested block of 64": (said(nested_blocksize=64), "256"),
    "nested in half": (said(nested_dtype="float16"), "nested_dtype"),
    "no offset": (said(nested_offset=None), "or none of them"),
    "offset too large": (said(nested_offset=1e300), "float32"),
    "offset NaN": (said(nested_offset=float("nan")), "nested_offset"),
    "not nested": (said(nested_offset=None, nested_dtype=None, nested_blocksize=None), "nested_absmax is unknown"),
    "shape too large": (said(shape=[24, 512]), "24 x 512"),
    "shape transposed": (said(shape=[-24, -256]), "sizes of at least 1"),
    "three dimensions": (said(shape=[2, 12, 256]), "shape"),
    "no codes": (put("weight", None), "a.weight is missing"),
    "codes in a row": (put("weight", NESTED_STATE["a.weight"].view(1, -1)), "weight is uint8"),
    "codes short": (put("weight", NESTED_STATE["a.weight"][:-1]), "weight is uint8"),
    "codes of int64": (put("weight", torch.zeros(384, 1, dtype=torch.int64)), "int64"),
    "no absmax": (put("weight.absmax", None), "absmax is missing"),
    "absmax short": (put("weight.absmax", torch.zeros(95, dtype=torch.uint8)), "uint8 [95]"),
    "absmax in float": (put("weight.absmax", torch.zeros(96)), "float32 [96]"),
    "nested NaN": (put(NESTED[0], torch.full((1,), torch.nan)), "NaN"),
    "nested twice": (put(NESTED[0], torch.ones(2)), "float32 [2]"),
    "levels of 15": (put("weight.quant_map", QUANT_MAP[:15]), "quant_map"),
    "other levels": (put("weight.quant_map", QUANT_MAP.flip(0)), "levels of NF4"),
    "map unsorted": (put(NESTED[1], MAP.flip(0)), "sorted"),
    "map short": (put(NESTED[1], MAP[:255]), "float32 [255]"),
    "map of NaN": (put(NESTED[1], torch.full((256,), torch.nan)), "NaN"),
    "an extra tensor": (put("weight.extra", torch.ones(1)), "a.weight.extra is unknown"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_the_tensors_name(damage: str) -> None:
    change, expected = DAMAGE[damage]
    state = dict(NESTED_STATE)
    change(state)
    with pytest.raises(FormatError) as error:
        weight_from(state, "a")
    assert expected in str(error.value)
    assert str(error.value).startswith("a.weight")


def test_plain_magnitudes_that_are_not_finite() -> None:
    state = tensors_of_weight(NF4(double=False).quantize(W), "a")
    state["a.weight.absmax"] = torch.full((96,), torch.inf)
    with pytest.raises(FormatError, match=r"absmax holds NaN or infinity"):
        weight_from(state, "a")


# ---- beside bitsandbytes


def layer_of(w: Tensor, *, nested: bool, block: int = 64) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(
        w, requires_grad=False, quant_type="nf4", compress_statistics=nested, blocksize=block
    )
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("nested", "block"), [(True, 64), (False, 64), (True, 128), (False, 256)])
def test_a_layer_of_bitsandbytes(nested: bool, block: int, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = layer_of(W.to(dtype), nested=nested, block=block)
    state = {f"a.{key}": value for key, value in layer.state_dict().items()}
    weight = weight_from(state, "a")
    assert (weight.dtype, weight.storage) == (dtype, NF4(block, nested))
    assert equal(tensors_of_weight(weight, "a"), state)
    assert list(tensors_of_weight(weight, "a")) == list(state)
    assert torch.equal(weight.tensor(), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


@pytest.mark.parametrize("nested", [True, False])
def test_our_layer_in_bitsandbytes(nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = NF4(double=nested).quantize(W.bfloat16())
    state = tensors_of_weight(weight, "a")
    stats = {key.removeprefix("a.weight."): value for key, value in state.items() if key != "a.weight"}
    read = bnb.nn.Params4bit.from_prequantized(state["a.weight"], stats, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(read.data, read.quant_state), weight.tensor())


def gpt2() -> Any:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return build(GPT2LMHeadModel, GPT2Config(initializer_range=0.1, tie_word_embeddings=False, **sizes, **tokens))


@pytest.mark.parametrize("holder", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("make", [small, gpt2])
def test_a_model_of_bitsandbytes_and_back(
    make: Callable[[], Any], nested: bool, holder: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    make().save_pretrained(tmp_path / "dense")
    write(tmp_path / "dense", tmp_path / "theirs", nested=nested, holder=holder)
    model = load_base(str(tmp_path / "theirs"))
    save_model(model, None, tmp_path / "ours", format="bitsandbytes")
    if holder is torch.uint8:
        assert equal(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert len(ours(model)) == len(model.hf_quantizer.report.sites) == (7 if make is small else 4)
    assert equal(theirs(again), ours(model))


def test_what_bitsandbytes_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = small()
    quantize(model, "int8")
    with pytest.raises(ValueError, match="cannot read reparam's int8"):
        save_model(model, None, tmp_path / "a", format="bitsandbytes")
    model = small()
    quantize(model, "nf4", targets=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embed_tokens is an embedding"):
        save_model(model, None, tmp_path / "a", format="bitsandbytes")
    with pytest.raises(ValueError, match="no storage"):
        save_model(small(), None, tmp_path / "a", format="bitsandbytes")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("targets", [["q_proj"], ["re:.*layers.*proj", "lm_head"]])
def test_a_part_of_the_model_in_bitsandbytes(targets: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = small()
    names = {site.name for site in quantize(model, "nf4", targets=targets).sites}
    save_model(model, None, tmp_path / "a", format="bitsandbytes")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert theirs(again).keys() == names


def write(dense: Path, folder: Path, *, nested: bool = True, holder: torch.dtype = torch.uint8) -> None:
    """Write a folder with a model quantized by bitsandbytes."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=holder,
    )
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=how).save_pretrained(folder)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        small().save_pretrained(temporary)
        write(Path(temporary), GOLDEN)
    sys.stdout.write(digest(theirs(AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.bfloat16))) + "\n")
