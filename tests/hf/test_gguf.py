"""GGUF files as bases: converted once, bound to adapters, refused with one sentence."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from command import reparam as command
from command import train
from models import IDS, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam.errors import BaseError, ConfigError
from reparam.export import gguf_model
from reparam.hf.models import load_base, load_tokenizer
from reparam.sites.walk import storages_in
from reparam.train.base import BaseConfig


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its matrices in Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    save_base(folder / "stock", tie_word_embeddings=True)
    model = load_base(str(folder / "stock"), dtype="float32")
    gguf_model.write(folder / "dense", model, load_tokenizer(str(folder / "stock")))
    reader = gguf.GGUFReader(folder / "dense" / "model.gguf")
    path = folder / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(tensor.shape) == 2:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reparam" / "gguf"


def test_the_model_is_that_of_transformers(file: Path, place: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    found = load_base(str(file))
    for (key, one), (other, two) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(one, two), key
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)
    text = "def f(x):\n    return 12"
    stock = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert load_tokenizer(str(file))(text)["input_ids"] == stock(text)["input_ids"]
    before = {entry: entry.stat().st_mtime_ns for entry in place.rglob("*.safetensors")}
    assert torch.equal(load_base(str(file)).lm_head.weight, found.lm_head.weight)
    assert {entry: entry.stat().st_mtime_ns for entry in place.rglob("*.safetensors")} == before


def test_shards_and_other_dtypes(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparam.hf.gguf.SHARD", 1 << 16)
    found = load_base(str(file), dtype="bfloat16")
    assert found.dtype == torch.bfloat16
    (folder,) = place.iterdir()
    assert len(list(folder.glob("*.safetensors"))) > 1
    exact = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(found.lm_head.weight, exact.lm_head.weight.bfloat16())


def test_quantized_while_it_is_read(file: Path) -> None:
    from reparam.weights.nf4 import NF4

    model = load_base(str(file), storage=NF4())
    assert len(storages_in(model)) == 14


def test_an_adapter_is_bound_to_it_and_merges(file: Path, rows: str, tmp_path: Path) -> None:
    assert train(str(file), rows, tmp_path / "out") == 0
    named = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())
    assert str(file) in json.dumps(named)
    assert command("merge", tmp_path / "merged", "-a", tmp_path / "out") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight, load_base(str(file)).model.layers[0].self_attn.q_proj.weight
    )
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_a_name_in_a_folder(file: Path) -> None:
    assert BaseConfig(path=str(file.parent), gguf=file.name) == BaseConfig(path=str(file))
    for path, name in ((str(file), file.name), (str(file.parent), "model"), ("", file.name)):
        with pytest.raises(ConfigError, match=r"base\.gguf"):
            BaseConfig(path=path, gguf=name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF" + b"\xff" * 20, "cannot be read"),
        (b"GGUF\3\0\0\0" + b"\1" + b"\0" * 7 + b"\1" + b"\0" * 7, "no causal language model could be loaded"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(BaseError, match=said):
        load_base(str(path))


def test_a_truncated_file_and_a_missing_one(file: Path, tmp_path: Path, place: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(BaseError, match="no causal language model could be loaded"):
        load_base(str(cut))
    assert not [entry for entry in place.iterdir() if entry.name.endswith("float32")] if place.exists() else True
    with pytest.raises(BaseError, match="no such file"):
        load_base(str(tmp_path / "none.gguf"))
