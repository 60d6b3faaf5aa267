"""Damaged, edited, exchanged and forged adapter files: one clear error each, and an unchanged model."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import frozen, llama, logits, same
from safetensors.torch import load_file, save_file
from torch import Tensor

import reparam
from reparam.io import files

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
SITE, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
GOLDEN = Path(__file__).parents[1] / "golden" / "adapter_v1"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An intact adapter folder, and its logits."""
    folder = tmp_path_factory.mktemp("native") / "adapter"
    model = llama()
    trained(model, modules_to_save=["model.norm"]).save(folder)
    return folder, logits(model).detach()


@pytest.fixture
def folder(good: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """A copy of the intact folder, to be damaged."""
    return Path(shutil.copytree(good[0], tmp_path / "adapter"))


def sign(config: dict[str, Any]) -> dict[str, Any]:
    """Write the configuration with a matching digest, as an attacker or a later release could."""
    rest = {key: value for key, value in config.items() if key != "digest"}
    text = json.dumps(rest, separators=(",", ":"))
    return {**rest, "digest": hashlib.sha256(text.encode()).hexdigest()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(sign(config) if signed else config))


def tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Write other tensors, and a configuration that matches them."""
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit(folder, lambda config: config["weights"].update(sha256=digest))


def refused(folder: Path, *words: str, model: Any = None, **options: Any) -> str:
    """Assert that loading raises FormatError with all these words, and leaves the model unchanged."""
    model = model or llama()
    before, text, trains = frozen(model), str(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(reparam.FormatError) as caught:
        reparam.load(model, folder, **options)
    assert same(frozen(model), before)
    assert str(model) == text
    assert [p.requires_grad for p in model.parameters()] == trains
    assert not hasattr(model, "reparam_state")
    message = str(caught.value)
    for word in (str(folder), *words):
        assert word in message
    return message


# Damage


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, name)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.99, 1])
def test_cut_short(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: min(int(share * len(content)), len(content) - 2)])
    refused(folder, name)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_something_else_in_the_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name}: not a regular file")


def test_no_folder_and_no_adapter(folder: Path) -> None:
    refused(folder / "absent", "no such folder")
    refused(folder / WEIGHTS, "is a file")
    shutil.copytree(folder, folder.parent / "run" / "one")
    refused(folder.parent / "run", "subfolders: one")
    (folder / CONFIG).unlink()
    refused(folder, "no adapter here")


def test_both_formats_in_one_folder(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds both adapter.json and adapter_config.json")


def test_weights_of_another_save(folder: Path, tmp_path: Path) -> None:
    trained(llama(), modules_to_save=["model.norm"], name="other").save(tmp_path / "other")
    found = load_file(tmp_path / "other" / WEIGHTS)
    save_file({key: tensor + 1 for key, tensor in found.items()}, folder / WEIGHTS)
    refused(folder, WEIGHTS, "belongs to another adapter")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *[leaf for key, child in inner for leaf in leaves(child, (*path, key))]]


def put(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


def at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def test_every_single_edit_is_noticed(folder: Path) -> None:
    """Each value is changed, each key removed, and each pair of neighbors swapped, one at a time."""
    config = json.loads((folder / CONFIG).read_text())
    edits = []
    for path in leaves(config)[1:]:
        value = at(config, path)
        edits.append(copy.deepcopy(config))
        other = {"x": 1} if isinstance(value, dict | list | None) else value + ("x" if isinstance(value, str) else 1)
        put(edits[-1], path, other)
        if isinstance(at(config, path[:-1]), dict):
            edits.append(copy.deepcopy(config))
            del at(edits[-1], path[:-1])[path[-1]]
        if isinstance(value, dict) and len(value) > 1:
            edits.append(copy.deepcopy(config))
            put(edits[-1], path, dict(reversed(value.items())))
    assert len(edits) > 100
    for edited in edits:
        (folder / CONFIG).write_text(json.dumps(edited))
        with pytest.raises(reparam.FormatError, match=CONFIG):
            files.read(folder)


# Files that agree with each other, and are wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(version=2), "version 2; a later release"),
        (lambda c: c.update(version=True), "version"),
        (lambda c: c.update(format="other"), "found 'other' version"),
        (lambda c: c.update(method="lorra"), "unknown method 'lorra' (did you mean 'lora' or"),
        (lambda c: c.update(extra=1), "extra: unknown key"),
        (lambda c: c.pop("settings"), "settings: missing"),
        (lambda c: c["settings"].update(alhpa=1), "alhpa: unknown key (did you mean 'alpha'?)"),
        (lambda c: c["settings"].update(r="2"), "r: expected a whole number, found '2'"),
        (lambda c: c["settings"].update(r=True), "r: expected a whole number, found True"),
        (lambda c: c["settings"].update(r=-1), "r=-1"),
        (lambda c: c["settings"].update(r=2**62), "cannot be put on this model"),
        (lambda c: c["settings"].update(r=2**80), "r: expected a whole number"),
        (lambda c: c["settings"].update(alpha=float("nan")), "alpha: expected a number, found nan"),
        (lambda c: c["settings"].update(alpha=10**400), "alpha: expected a number"),
        (lambda c: c["settings"].update(rank_pattern=[1]), "rank_pattern: expected an object, found a list of 1"),
        (lambda c: c["settings"].update(rank_pattern={"q_proj": 2.5}), "rank_pattern['q_proj']"),
        (lambda c: c["settings"].update(rank_pattern={"nothing": 2}), "'nothing' matches none"),
        (lambda c: c["settings"].update(rank_pattern={"(": 2}), "("),
        (lambda c: c.update(sites=[]), "sites: expected an object"),
        (lambda c: c["sites"].update({SITE: 3}), f"sites['{SITE}']"),
        (lambda c: c["sites"][SITE].update(shape=[-32, 32]), f"sites['{SITE}']"),
        (lambda c: c["sites"][SITE].update(shape=[32]), "shape: expected 2 values"),
        (lambda c: c["sites"][SITE].update(shape=[32, "32"]), "shape[1]"),
        (lambda c: c["sites"][SITE].update(shape=[33, 32]), "the adapter was trained on linear, 33 x 32"),
        (lambda c: c["sites"][SITE].update(kind="embedding"), "the adapter was trained on embedding"),
        (lambda c: c["sites"][SITE].update(kind="conv"), "kind: expected one of 'embedding', 'expert'"),
        (lambda c: c["sites"].update({"": c["sites"][SITE]}), "the model itself"),
        (lambda c: c["sites"].update({"model.nowhere": c["sites"][SITE]}), "model.nowhere"),
        (lambda c: c["sites"].update({"re:.*": c["sites"][SITE]}), "re:.*"),
        (lambda c: c["sites"].update({"model.layers.1.mlp.gate_proj": c["sites"][UP]}), "missing"),
        (lambda c: c["sites"].pop(SITE), f"unknown tensor {SITE}.A"),
        (lambda c: c.update(replaced=["model.norm", "model.norm"]), "twice"),
        (lambda c: c.update(replaced=["model.norm", "model.layers.0"]), "different weights"),
        (lambda c: c.update(replaced="model.norm"), "replaced: expected a list"),
        (lambda c: c.update(replaced=[]), "unknown tensor model.norm.weight"),
        (lambda c: c.update(base="x"), "base: expected an object or null, found 'x'"),
        (lambda c: c["base"].update(digests=["x"]), "base.digests"),
        (lambda c: c["base"].pop("architecture"), "base.architecture: missing"),
        (lambda c: c["weights"].update(file="../other.safetensors"), "weights.file: expected 'adapter.safetensors'"),
        (lambda c: c["weights"].update(file="/etc/passwd"), "weights.file"),
        (lambda c: c["weights"].update(sha256=None), "weights.sha256"),
        (lambda c: c.update(weights="adapter.safetensors"), "weights: expected an object"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds:UserWarning")
def test_signed_nonsense(folder: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(folder, change)
    refused(folder, words)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"null", b"[]", b"3", b'{"a": }', b"[" * 100_000, b'{"a": ' * 100_000, b"1" * 10_000, b'{"a": NaN}'],
    ids=lambda content: repr(content[:8]),
)
def test_json_that_is_no_configuration(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(folder, CONFIG)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{SITE}.B"), f"missing {SITE}.B"),
        (lambda t: t.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda t: t.update({f"{SITE}.C": torch.zeros(2)}), f"unknown {SITE}.C"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(97, 32)}), "unknown tensor lm_head.weight"),
        (lambda t: t.update({f"{SITE}.B": torch.zeros(32, 3)}), f"{SITE}.B has shape [32, 3], expected [32, 2]"),
        (lambda t: t.update({f"{SITE}.B": torch.zeros(64)}), f"{SITE}.B has shape [64]"),
        (lambda t: t.update({f"{SITE}.B": torch.zeros(32, 2, dtype=torch.int64)}), f"{SITE}.B is torch.int64"),
        (lambda t: t.update({f"{SITE}.B": torch.zeros(32, 2, dtype=torch.complex64)}), "torch.complex64"),
        (lambda t: t.update({f"{SITE}.B": torch.zeros(32, 2).to(torch.float8_e4m3fn)}), "torch.float8_e4m3fn"),
        (lambda t: t[f"{SITE}.A"].fill_(float("nan")), f"NaN or infinity in {SITE}.A"),
        (lambda t: t[f"{SITE}.A"][0].fill_(float("-inf")), f"NaN or infinity in {SITE}.A"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_signed_tensors_that_do_not_fit(folder: Path, change: Callable[[Tensors], object], words: str) -> None:
    tensors(folder, change)
    refused(folder, words)


def test_problems_are_told_together(folder: Path) -> None:
    tensors(folder, lambda t: [t.pop(key) for key in list(t) if key.endswith(".B")])
    message = refused(folder, "missing")
    assert message.count("missing") == 4


def test_a_file_name_that_leads_out_is_not_followed(folder: Path) -> None:
    """Even if that file exists and has the right digest."""
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    edit(folder, lambda config: config["weights"].update(file="../outside.safetensors"))
    refused(folder, "weights.file")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 99)
    | st.sampled_from([2**62, -(2**70)])
    | st.floats()
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
harmless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)


def check_load(folder: Path) -> bool:
    """Whether the folder loads; otherwise it must raise FormatError. The model ends as the base, bit for bit."""
    model = llama()
    before, text = frozen(model), str(model)
    try:
        reparam.load(model, folder, check_base=False)
    except reparam.FormatError:
        loaded = False
        assert not hasattr(model, "reparam_state")
    else:
        loaded = True
        assert torch.isfinite(logits(model)).all()
        reparam.remove(model, "default")
    assert same(frozen(model), before)
    assert str(model) == text
    return loaded


@harmless
@given(data=st.data())
def test_fuzz_of_values(folder: Path, data: st.DataObject) -> None:
    """Replace any value by any other, with a matching digest."""
    before = (folder / CONFIG).read_bytes()
    config = json.loads(before)
    path = data.draw(st.sampled_from([path for path in leaves(config)[1:] if path != ("digest",)]))
    put(config, path, data.draw(json_values))
    (folder / CONFIG).write_text(json.dumps(sign(config)))
    check_load(folder)
    (folder / CONFIG).write_bytes(before)


@harmless
@given(name=st.sampled_from([WEIGHTS, CONFIG]), data=st.data())
def test_fuzz_of_bytes(good: tuple[Path, Tensor], folder: Path, name: str, data: st.DataObject) -> None:
    """Flipped, removed and inserted bytes give an error, unless only white space changed."""
    before = (folder / name).read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            content[place : place + (kind == "cut")] = (
                data.draw(st.binary(min_size=1, max_size=3)) if kind != "cut" else b""
            )
    (folder / name).write_bytes(content)
    if check_load(folder):
        assert json.loads((folder / CONFIG).read_text()) == json.loads((good[0] / CONFIG).read_text())
        assert (folder / WEIGHTS).read_bytes() == (good[0] / WEIGHTS).read_bytes()
    (folder / name).write_bytes(before)
