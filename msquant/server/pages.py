"""The pages that a browser is shown: they are whole in themselves and ask nobody but this server."""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from msquant import __version__

MOST_TOKENS = 512
"""Of an answer in the box of `/`."""
_QUESTION = "Who are you?"
_CONTINUED = "I am"


class Pages:
    """Renders `/` and `/docs`; everything that is not of this module is escaped.

    Args:
        model: its id.
        keyed: whether clients must send a key.
        chats: whether it has a chat template; otherwise texts are continued.
        longest: so many tokens an answer may have.
    """

    def __init__(self, model: str, keyed: bool, chats: bool, longest: int) -> None:
        self._environment = Environment(
            loader=PackageLoader("msquant.server", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._style, self._script = (_own(name) for name in ("page.css", "page.js"))
        self._about = {
            "model": model,
            "keyed": keyed,
            "chats": chats,
            "most_tokens": min(longest, MOST_TOKENS),
            "version": __version__,
        }

    def home(self, host: str) -> HTMLResponse:
        """The page at `/`.

        Args:
            host: name and port by which the client has called the server.
        """
        address = f"http://{host}"
        commands = {"curl": self._curl(address), "python": self._python(address)}
        return self._page("home.html.j2", {"address": address, "commands": commands})

    def docs(self, schema: dict[str, Any]) -> HTMLResponse:
        """The page at `/docs`.

        Args:
            schema: in the form of OpenAPI 3.1.
        """
        return self._page("docs.html.j2", {"operations": list(_operations(schema))})

    def _page(self, template: str, content: dict[str, Any]) -> HTMLResponse:
        page = self._environment.get_template(template).render(
            **self._about, **content, style=Markup(self._style), script=Markup(self._script)
        )
        policy = (
            f"default-src 'none'; style-src {_hash(self._style)}; script-src {_hash(self._script)}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(page, headers=headers)

    def _curl(self, address: str) -> str:
        lines = [f"curl {shlex.quote(address + self._path())}", "-H 'Content-Type: application/json'"]
        if self._about["keyed"]:
            lines.append('-H "Authorization: Bearer $KEY"')
        asked = {"model": self._about["model"], **self._asked()}
        lines.append(f"-d {shlex.quote(json.dumps(asked, ensure_ascii=False))}")
        return " \\\n  ".join(lines)

    def _python(self, address: str) -> str:
        key = 'os.environ["KEY"]' if self._about["keyed"] else '"none"'
        call = "client.chat.completions" if self._about["chats"] else "client.completions"
        arguments = [f"{name}={value!r}" for name, value in self._asked().items()]
        answer = "message.content" if self._about["chats"] else "text"
        return "\n".join(
            [
                *(["import os", ""] if self._about["keyed"] else []),
                "from openai import OpenAI",
                "",
                f'client = OpenAI(base_url="{address}/v1", api_key={key})',
                f"answer = {call}.create(",
                f"    model={self._about['model']!r},",
                *(f"    {argument}," for argument in arguments),
                ")",
                f"print(answer.choices[0].{answer})",
            ]
        )

    def _path(self) -> str:
        return "/v1/chat/completions" if self._about["chats"] else "/v1/completions"

    def _asked(self) -> dict[str, Any]:
        if self._about["chats"]:
            return {"messages": [{"role": "user", "content": _QUESTION}]}
        return {"prompt": _CONTINUED, "max_tokens": 32}


@dataclass(frozen=True)
class Operation:
    """One row of the interface: a method of a path, and what it takes."""

    method: str
    path: str
    about: str
    fields: list["TakenField"]


@dataclass(frozen=True)
class TakenField:
    """A field of a request's body."""

    name: str
    kind: str
    needed: bool
    about: str


def _own(name: str) -> str:
    return files("msquant.server").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What the policy calls an inline element by, https://www.w3.org/TR/CSP3/#grammardef-hash-source."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _operations(schema: dict[str, Any]) -> Iterator[Operation]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            fields = _fields(body["schema"], schema) if body else []
            yield Operation(method.upper(), path, operation.get("description", ""), fields)


def _fields(reference: dict[str, Any], schema: dict[str, Any]) -> list[TakenField]:
    found = _resolved(reference, schema)
    needed = found.get("required", [])
    return [
        TakenField(name, _kind(one, schema), name in needed, one.get("description", ""))
        for name, one in found["properties"].items()
    ]


def _resolved(found: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in found:
        return found
    named: dict[str, Any] = schema["components"]["schemas"][found["$ref"].rpartition("/")[2]]
    return named


def _kind(found: dict[str, Any], schema: dict[str, Any]) -> str:
    """A type with its limits, in words."""
    if "anyOf" in found:
        ways = [_kind(one, schema) for one in found["anyOf"] if one.get("type") != "null"]
        return " or ".join(ways)
    found = _resolved(found, schema)
    if "properties" in found:
        return "{" + ", ".join(found["properties"]) + "}"
    if found.get("type") == "array":
        most = f", at most {found['maxItems']}" if "maxItems" in found else ""
        return f"list of {_kind(found['items'], schema)}{most}"
    limits = [
        f"{sign} {_digits(found[name])}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in found
    ]
    length = [f"of at most {found['maxLength']} characters"] if "maxLength" in found else []
    return " ".join([str(found.get("type", "any")), *limits, *length])


def _digits(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
