"""Check the name or the folder of a base model before transformers reads it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from reparam.core.checks import nearest, whole
from reparam.core.strict_json import loads
from reparam.data.files.reach import unreachable
from reparam.errors import BaseError, DuplicateKey

SETTINGS = ("config.json", "generation_config.json")
VOCABULARIES = ("tokenizer.json", "vocab.json")
ADAPTERS = ("adapter.json", "adapter_config.json")
LARGEST_JSON = 64 << 20
LARGEST = 512 << 20  # of vocabularies and of other files beside the weights
BESIDE = {".json", ".txt", ".jinja", ".model", ".tiktoken"}


def is_gguf(path: str) -> bool:
    """Whether this path names a GGUF file."""
    return path.lower().endswith(".gguf") and not Path(path).is_dir()


def check_path(path: str) -> bool:
    """Raise BaseError for a path that is no model: not a folder, no config.json, or files that nobody should read.

    These are files that are not regular (a pipe would never end), files beside the weights of a size that no model has,
    and settings that hold a key twice. A hub id passes if the hub can be asked, or if the model is in its cache.
    Returns whether the files can come only from the cache, because the hub cannot be asked.
    """
    if not path:
        raise BaseError("no base model was given: set base.path to a folder or a hub id")
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").exists():
            raise BaseError(f"{path}: is not a model folder, because it has no config.json{_adapter_hint(local)}")
        for entry in sorted(local.iterdir()):
            _check_entry(path, entry)
        return False
    if local.exists():
        raise BaseError(f"{path}: is a file; give the model's folder, a GGUF file or a hub id")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        near = [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else []
        raise BaseError(f"{path}: no such folder{nearest(local.name, near)}")
    if not (why := unreachable()):
        return False
    try:
        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="model"))
        validate_repo_id(path)
    except ValueError as error:
        raise BaseError(f"{path}: no such folder, and no name of a model on the hub: {error}") from None
    if not folder.is_dir():
        raise BaseError(f"{path}: no such folder, and no model of this name is in the hub's cache ({why})")
    return True


def _check_entry(path: str, entry: Path) -> None:
    if not entry.is_file():
        if entry.exists() and not entry.is_dir():
            raise BaseError(f"{path}: {entry.name} is not a regular file; remove it")
        return
    if entry.suffix not in BESIDE:
        return
    size = entry.stat().st_size
    most = LARGEST_JSON if entry.suffix == ".json" and entry.name not in VOCABULARIES else LARGEST
    if size > most:
        raise BaseError(f"{path}: {entry.name}: {size:,} bytes, more than the {most:,} that such a file can have")
    if entry.name in SETTINGS:
        try:
            values = loads(entry.read_bytes())
        except DuplicateKey as error:
            raise BaseError(f"{path}: {entry.name}: {error}") from None
        except (ValueError, OSError):
            return  # transformers reports it
        for key, value in values.items() if isinstance(values, dict) else ():
            ids = value if isinstance(value, list) else [value]
            if key.endswith("_token_id") and value is not None and not all(whole(each, -1) for each in ids):
                raise BaseError(f"{path}: {entry.name}: {key}: expected the number of a token or a list of numbers")


def _adapter_hint(folder: Path) -> str:
    held = [name for name in ADAPTERS if (folder / name).exists()]
    if any((folder / "adapter" / name).exists() for name in ADAPTERS):
        return " (it is a training run: pass it as the adapter, and its base model as the base)"
    return (
        f" ({held[0]} shows that it is an adapter: pass it as the adapter, and its base model as the base)"
        if held
        else ""
    )
