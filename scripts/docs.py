"""Generate pages of the documentation, as a hook of MkDocs (`make docs`).

The first page is made from the README, the configuration reference from the dataclasses, the command-line reference
from the options, the API reference from the modules of each package, and comparison reports from their JSON files.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reparam.methods
import reparam.weights
from reparam.cli.config_options import ALIASES, TITLES
from reparam.cli.options import VERBS, app
from reparam.compare.report import render
from reparam.core.base import Storage
from reparam.core.documentation import documentation
from reparam.core.registry import METHODS
from reparam.train.config import SECTIONS, fields_of

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "reparam"
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those in docs/."""
    from mkdocs.structure.files import File

    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path below docs/ and the text of each generated page."""
    yield "index.md", first_page((ROOT / "README.md").read_text())
    yield "reference/configuration.md", configuration()
    yield "reference/command-line.md", command_line()
    yield "reference/api/index.md", names()
    for folder in sorted(SOURCE.iterdir()):
        if (folder / "__init__.py").exists() and folder.name != "cli":
            yield f"reference/api/{folder.name}.md", room(folder)
    yield "reference/api/errors.md", "# reparam.errors\n\n::: reparam.errors\n\n"
    for file in sorted((ROOT / "docs" / "compare").glob("*.json")):
        yield f"compare/{file.stem}.html", render(json.loads(file.read_text()))


def first_page(readme: str) -> str:
    """The README with links relative to docs/; links to other files of the repository become plain file names."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if target.startswith("http"):
            return found[0]
        return f"[{text.removeprefix('docs/')}]({target[5:]})" if target.startswith("docs/") else f"`{target}`"

    readme = re.sub(r"^.*\(README\.zh-CN\.md\)\n\n", "", readme, flags=re.MULTILINE)  # the site is in English
    return LINK.sub(link, readme.partition("\n## More\n")[0]) + "\n"


# --- configuration ---


def configuration() -> str:
    """The page of all keys of all sections and the settings of all methods."""
    parts = [
        "# Configuration",
        "These keys are the same in a TOML file (`reparam train --config run.toml`), where each section is a table, "
        "and on the command line, where a key is `--section.key`. Options on the command line override the file. "
        "The resolved configuration is written to `config.toml` in the output folder and reproduces the run.",
        "`reparam train --help-all` prints the same list. The column *other names* has options of PEFT, TRL, "
        "transformers and LLaMA-Factory that `reparam train` also accepts.",
    ]
    for section in SECTIONS:
        parts.append(f"## {TITLES[section].partition('  ')[0]} `[{section}]`")
        parts.append(table((f"{section}.{name}", *found) for name, found in fields_of(section).items()))
    parts += [
        f"## {TITLES['method'].partition('  ')[0]} `[method]`",
        f"`method.name` is the method, `lora` by default (other names: {_code(ALIASES['method.name'])}). Its "
        "settings are keys of the same section. `method.seed` defaults to `run.seed`.",
    ]
    for name, method in METHODS.items():
        parts += [f"### {name}", plain((inspect.getdoc(method) or "").split("\n\n")[0])]
        fields = dataclasses.fields(method)
        parts.append(table((f"method.{f.name}", method, f) for f in fields) if fields else "It has no settings.")
    return "\n\n".join(parts) + "\n"


def table(keys: Iterable[tuple[str, type, dataclasses.Field[Any]]]) -> str:
    """Markdown table with one row for each key: name, type, default, other names, meaning."""
    lines = ["| key | type | default | other names | meaning |", "|---|---|---|---|---|"]
    for key, cls, field in keys:
        meaning = plain(documentation(cls).get(field.name, ""))
        meaning = f"{cls.name}: {meaning}" if issubclass(cls, Storage) else meaning
        cells = [f"`{key}`", _code([str(field.type)]), default(field), _code(ALIASES.get(key, [])), meaning]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default as in TOML; empty for a field without a default, and for None and ""."""
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is None or value is dataclasses.MISSING or value == "":
        return ""
    return _code([json.dumps(value) if isinstance(value, str | bool | dict | tuple) else str(value)])


def plain(text: str) -> str:
    """Join the lines of a paragraph and escape it for Markdown, also inside a table."""
    text = " ".join(text.split())
    return re.sub(r"(`[^`]*`)|([|<*\[\]])", lambda found: found[1] or f"\\{found[2]}", text)


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


# --- command line ---


def command_line() -> str:
    """The page of all verbs with their arguments and options."""
    from typer.main import get_command

    parts = [
        "# Command line",
        "`reparam VERB --help` prints the options of a verb. `python -m reparam` is the same command. Exit codes: 0 "
        "success, 1 failure at run time, 2 wrong usage or configuration, 130 after SIGINT, 143 after SIGTERM.",
        "\n".join(
            ["| verb | what it does |", "|---|---|"] + [f"| [{v}](#{v}) | {plain(VERBS[v][1])} |" for v in VERBS]
        ),
    ]
    verbs: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in [pair for verb in verbs.items() for pair in _with_parts(*verb)]:
        parts += [f"## {name}", *described(command.help or "")]
        rows = [row for parameter in command.params if (row := option(parameter))]
        if name == "train":
            parts.append(
                "All keys of the [configuration](configuration.md) are options; the table has the most common ones."
            )
        if rows:
            parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _with_parts(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a verb and, if it is a group, the verbs in it."""
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield f"{name} {part}", inner


def described(text: str) -> Iterator[str]:
    """Yield the paragraphs of a verb's description; an example in bold becomes a code block."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        for example in re.findall(r"\[bold\](.*?)\[/bold\]", paragraph, re.DOTALL):
            yield "```\n" + "\n".join(line.strip() for line in example.splitlines()) + "\n```"
        rest = re.sub(r"\[bold\].*?\[/bold\]", "", paragraph, flags=re.DOTALL)
        if rest.strip():
            yield plain(rest)


def option(parameter: Any) -> str:
    """Table row of one option; empty for a hidden option and for `--help`."""
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return ""
    if parameter.param_type_name == "argument":
        names = str(parameter.metavar or parameter.name).upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    text = parameter.help or ""
    given = re.search(r"\[dim\]\(default: (.*?)\)\[/dim\]", text)
    value = given[1] if given else parameter.default
    shown = "required" if parameter.required else "" if value in (None, False, ()) else _code([str(value)])
    meaning = plain(re.sub(r"\[/?[a-z ]+\]", "", text.replace(given[0], "") if given else text).replace("\\[", "["))
    return f"| {_code([names])} | {shown} | {meaning} |"


# --- API ---


def names() -> str:
    """The page of the names that `reparam` exports, each with its first sentence and a link to its package's page."""
    lines = ["# API", "These names can be imported from `reparam`. The pages of its packages have all other names.", ""]
    lines += ["| name | |", "|---|---|"]
    for name in sorted(reparam.__all__, key=str.lower):
        found = getattr(reparam, name)
        if inspect.ismodule(found):
            target = f"({found.__name__.split('.')[1]}.md)"
        else:
            target = f"[{found.__module__}.{found.__qualname__}]"
        sentence = re.split(r"(?<!al)\.\s|\n\n", inspect.getdoc(found) or "")[0].removesuffix(".")
        lines.append(f"| [`{name}`]{target} | {plain(sentence)} |")
    return "\n".join(lines) + "\n"


def room(folder: Path) -> str:
    """The page of a package: a directive of mkdocstrings for each of its modules with a public name."""
    package = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    lines = [f"# reparam.{folder.name}", package]
    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text())
        defined = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        if not any(not node.name.startswith("_") for node in defined):
            continue
        module = file.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        lines.append(f"::: {module}")
    return "\n\n".join(lines) + "\n"
