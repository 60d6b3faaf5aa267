"""The public interface: exports, when they are imported, methods by name, errors, how things print."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import models
import pytest
from torch import nn

import reparam
from reparam import errors
from reparam.core.registry import METHODS, STORAGES

ROOT = Path(reparam.__file__).parent
ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}
OTHERS = set(ERRORS) - {"ReparamError"}


def child(code: str) -> str:
    """The output of this code in a fresh process."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Runs each of these lines, and then the other, in a fork of a process that has imported torch but not reparam.
EACH_IN_A_FORK = """
import os, torch, safetensors.torch
for use in {}:
    if not os.fork():
        exec(use)
        exec({!r})
        os._exit(0)
    os.wait()
"""


# ---- names and when they are imported


@pytest.mark.parametrize("name", reparam.__all__)
def test_every_exported_name_is_there_and_documented(name: str) -> None:
    found = getattr(reparam, name)
    assert inspect.getdoc(found), f"{name} has no docstring"
    assert vars(reparam)[name] is found, "it is kept once it is imported"


def test_dir_lists_what_is_exported() -> None:
    assert dir(reparam) == sorted([*reparam.__all__, "__version__"])
    assert len(set(reparam.__all__)) == len(reparam.__all__)


def test_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    [block] = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    names, modules = {}, {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            path = f"{node.module}.{alias.name}"
            file = ROOT.parent / path.replace(".", "/")
            if file.is_dir() or file.with_suffix(".py").exists():
                modules[alias.asname or alias.name] = path
            else:
                names[alias.asname or alias.name] = node.module
    assert modules == reparam._MODULES
    assert names == reparam._HOMES
    assert set(reparam.__all__) == set(names) | {"errors", "optim", "prompts"}


def test_no_name_hides_a_module() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms | {"errors", "prompts"} == set(reparam._MODULES)
    assert not set(reparam._HOMES) & set(reparam._MODULES)
    for name, path in reparam._MODULES.items():
        assert getattr(reparam, name) is import_module(path)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'reparam' has no attribute 'Lora'"):
        reparam.Lora  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(reparam, "lora")


def test_importing_the_package_imports_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    errors_too = "reparam.FormatError, reparam.errors, dir(reparam), reparam.__version__"
    assert child(f"import reparam, sys; {errors_too}; print({heavy} or 'none')") == "none"


def test_a_first_use_registers_all_methods_and_storages() -> None:
    """Whichever name is used first, also without going through the package's attributes."""
    uses = ["import reparam.methods, reparam.weights", "import reparam.io.files"]
    uses += [f"import reparam; reparam.{name}" for name in ("LoRA", "NF4", "method", "attach")]
    count = "from reparam.core.registry import METHODS, STORAGES; print(len(METHODS), len(STORAGES), flush=True)"
    (methods, storages), from_files, *others = map(str.split, child(EACH_IN_A_FORK.format(uses, count)).splitlines())
    assert methods != "0"
    assert from_files[0] == methods
    assert others == [[methods, storages]] * 4


def test_python_m_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "reparam", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
    assert (ROOT / "py.typed").exists()


# ---- methods by name


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_a_method_by_name_is_its_configuration() -> None:
    by_name = reparam.attach(two(), "lora", r=2, alpha=4.0, targets=["0"], name="task")
    assert by_name.method == reparam.LoRA(r=2, alpha=4.0)
    assert list(by_name.sites) == ["0"]
    assert reparam.attach(two(), "adalora").method == reparam.AdaLoRA()


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (
            "lora",
            {"rank": 8, "alhpa": 2},
            r"lora has no setting 'rank'.*, 'alhpa' \(did you mean 'alpha'.*settings are r,",
        ),
        ("lora", {"target": "0"}, "no setting 'target'.*did you mean 'targets'"),
        ("lroa", {}, r"unknown method 'lroa' \(did you mean 'lora'"),
        ("lora", {"r": 0}, "r=0"),
        (reparam.LoRA(), {"r": 4}, r"r=4; pass a setting of the method in its configuration: .*LoRA\(r=...\)"),
        (reparam.LoRA(), {"target": ["0"]}, "did you mean 'targets'"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_touched(
    method: str | reparam.Method, given: dict[str, object], message: str
) -> None:
    model = two()
    with pytest.raises(ValueError, match=message):
        reparam.attach(model, method, **given)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear  # type: ignore[index]
    assert not hasattr(model, "reparam_state")
    assert all(p.requires_grad for p in model.parameters())


# ---- errors


def test_all_errors_are_in_one_tree() -> None:
    defined = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in ROOT.rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(re.search("Error$|Exception$", ast.unparse(base)) for base in node.bases)
    }
    assert defined == set(), "errors are defined in errors.py"
    assert all(issubclass(value, reparam.ReparamError) for value in ERRORS.values())
    assert set(ERRORS) <= set(reparam.__all__)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_an_error_is_drawn_with_the_built_in_one_that_it_also_is(name: str) -> None:
    bases = [base.__name__ for base in ERRORS[name].__bases__ if base is not reparam.ReparamError]
    drawn = re.search(rf"── {name} +(?:\((\w+)\))?", errors.__doc__ or "")
    assert drawn, f"the tree lacks {name}"
    assert [drawn[1]] == (bases or [None])
    docs = (ROOT.parents[1] / "docs" / "errors.md").read_text()
    assert f"`{name}`" in docs
    assert not bases or re.search(rf"`{name}`[^\n]*`{bases[0]}`", docs)


def test_a_full_disk_keeps_its_number() -> None:
    error = reparam.DiskFull(28, "no room", "file")
    assert (error.errno, error.strerror, error.filename) == (28, "no room", "file")
    assert str(reparam.Stopped(15)) == "stopped by SIGTERM"


# ---- how things print


def test_what_is_returned_prints_as_one_line() -> None:
    model = models.llama()
    adapter = reparam.attach(model, "lora", r=2, targets=["q_proj"], name="task")
    assert re.fullmatch(r"Adapter\('task', lora, \d+ sites, [\d,]+ parameters\)", repr(adapter))
    adapter.requires_grad_(False)
    assert repr(adapter).endswith(" parameters, frozen)")
    kind = type(model).__name__
    assert repr(reparam.select(model, None)) == f"Selection(the base on {kind}, before: 'task')"
    rows = reparam.select(model, ["task", None])
    assert repr(rows) == f"Selection(2 rows: 1 of 'task', 1 of the base on {kind}, before: the base)"
    reparam.select(model, "task")
    merged = reparam.merge(model, keep_base=True)
    sites = len(merged.sites)
    assert repr(merged) == f"MergeReport('task', {sites} sites, nothing changed, base kept)"
    merged = reparam.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), "int8", targets="0")
    assert repr(merged) == "QuantizeReport(int8, 1 matrix, 16 KiB -> 4.25 KiB, 8.5 bits per entry, 1 not quantized)"


def test_an_adapter_that_was_removed_still_prints() -> None:
    model = two()
    adapter = reparam.attach(model, "lora", r=2, name="task")
    reparam.remove(model, "task")
    assert repr(adapter) == "Adapter('task', lora, removed)"


def test_blends_and_compressions_print_as_one_line(tmp_path: Path) -> None:
    adapter = reparam.attach(two(), "lora", r=2, name="task")
    for parameter in adapter.parameters():
        nn.init.ones_(parameter)
    adapter.save(tmp_path / "task")
    blend = reparam.blend([tmp_path / "task", tmp_path / "task"], [0.5, 0.5])
    assert re.fullmatch(r"Blend\(delta, 2 sites, error [\d.e-]+\)", repr(blend))
    compression = reparam.compress(tmp_path / "task", rank=1)
    assert re.fullmatch(r"Compression\(2 sites, 256 B -> 128 B, error [\d.e-]+\)", repr(compression))


def test_the_old_name_of_quantize_warns_and_works() -> None:
    with pytest.warns(FutureWarning, match=r"reparam\.pack is now reparam\.quantize"):
        assert len(reparam.pack(nn.Sequential(nn.Linear(64, 64)), "int8").sites) == 1  # type: ignore[attr-defined]


def test_the_registries_are_full() -> None:
    assert {"lora", "dora", "adalora", "full", "mixture", "xlora"} <= set(METHODS)
    assert {"dense", "nf4", "int8"} <= set(STORAGES)
