"""The program that `data/rendering.py` runs in a process of its own: it renders chat templates, one request per line.

Templates come from downloaded folders. They cannot call Python (jinja2's sandbox); this process bounds their memory,
and its parent their time. Each request is a JSON object with `template` and `variables`; the response has `text` and
`spans`, or `error` and `fatal`: whether the template itself is unusable, whatever the messages. A request with `chats`,
a list of lists of messages, gets a list of the SHA-256 of their texts, with null for those that cannot be rendered.

The environment is that of transformers. This file imports only jinja2 and the standard library, so it starts quickly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEBIBYTES = 1024
LONGEST = 2**24  # characters of a rendered chat


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`: `spans` collects the character ranges of its bodies in the rendered text."""

    tags = {"generation"}  # noqa: RUF012  (an instance variable of the base class)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.length = 0  # of the text rendered so far
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> Node:
        """Make the body of the tag a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        self.spans.append((self.length, self.length + len(text)))
        return text


class _PublicNamespace(Namespace):
    """`namespace()` without attributes that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, args = args[0], args[1:]
        held = dict(*args, **values)
        for name in held:
            _check_public(name)
        Namespace.__init__(self, held)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """The compiled template. Raises jinja2.TemplateError for a template with wrong syntax."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _PublicNamespace
    return environment.from_string(template)


def rendered(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The response to a request."""
    try:
        made = compiled(template)
        mark: Any = next(e for e in made.environment.extensions.values() if isinstance(e, Generation))
        mark.length, mark.spans, blocks = 0, [], []
        for block in made.generate(**variables):
            blocks.append(block)
            mark.length += len(block)
            if mark.length > LONGEST:
                return {"error": f"renders more than {LONGEST:,} characters", "fatal": True}
        return {"text": "".join(blocks), "spans": mark.spans}
    except MemoryError:
        return {"error": f"needs more than {MEBIBYTES} MiB of memory", "fatal": True}
    except RecursionError:
        return {"error": "calls itself without end", "fatal": True}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"cannot be read: {error.message} (line {error.lineno})", "fatal": True}
    except Exception as error:  # whatever a filter or a method raises for the values that the template gives it
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"error": f"refuses the row: {reason}", "fatal": False}


def several(chats: list[Any], request: dict[str, Any]) -> list[str | None]:
    """The SHA-256 of the texts of several chats that share their other variables; None for one that has no text."""
    shared = request["variables"]
    found = (rendered(request["template"], {**shared, "messages": chat}).get("text") for chat in chats)
    return [None if text is None else hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in found]


def main() -> None:
    """Answer the requests on standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with contextlib.suppress(ValueError, OSError):  # some systems cannot limit the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEBIBYTES * 2**20, MEBIBYTES * 2**20))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        chats = request.get("chats")
        found = rendered(request["template"], request["variables"]) if chats is None else several(chats, request)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
