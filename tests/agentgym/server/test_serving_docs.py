"""docs/serving.md says what the code does: its tables are made from the code. `python THIS_FILE` writes them anew."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from agentgym.server.health import Health
from agentgym.server.messages_api import MessagesSurface
from agentgym.server.messages_requests import MessagesRequest
from agentgym.server.metrics import Metrics
from agentgym.server.openai_answering import Answering
from agentgym.server.openai_api import OpenAiSurface
from agentgym.server.openai_requests import ChatRequest, CompletionRequest, SampledRequest
from agentgym.server.replies import Replies
from agentgym.server.responses_api import ResponsesSurface
from agentgym.server.responses_requests import ResponsesRequest
from agentgym.server.settings import ServerSection
from agentgym.server.visit import Visit

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


def parameters(model: type[SampledRequest]) -> list[str]:
    """What is honoured, what is taken with one value only, and what is a label; nothing else is taken."""
    rows = ["| parameter | |", "|---|---|"]
    neutral = {
        name: " or ".join(f"`{_json(one)}`" for one in _taken(allowed)) for name, allowed in model.NEUTRAL.items()
    }
    for name, field in model.model_fields.items():
        if field.description:
            said = field.description + (f" (only {neutral[name]})" if name in neutral else "")
            rows.append(f"| `{name}` | {said} |")
        else:
            assert (name in neutral) != (name in model.LABELS), f"{name}: neither honoured, nor neutral, nor a label"
    rest = [name for name in neutral if not model.model_fields[name].description]
    only = ", ".join(f"`{name}` ({neutral[name]})" for name in rest)
    rows.append(f"| {only} | refused with any other value |")
    rows.append("| " + ", ".join(f"`{name}`" for name in model.LABELS) + " | taken, and changes nothing |")
    return rows


def _taken(allowed: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leaving a parameter out is the same as null, which is all that some may say."""
    return allowed or (None,)


def _json(value: Any) -> str:
    return json.dumps(value)


def routes() -> list[str]:
    nothing: Any = None
    answering = Answering("m", 1, Replies(nothing, nothing, 1, 1.0), nothing)
    spoken = (OpenAiSurface(answering), ResponsesSurface(answering), MessagesSurface(answering))
    surfaces = (*spoken, Health(nothing, Metrics()))
    rows = ["| route | |", "|---|---|"]
    for surface in surfaces:
        for route in surface.router().routes:
            assert isinstance(route, APIRoute)
            method = next(iter(sorted(route.methods or ())))
            if "{session_id}" not in route.path:
                rows.append(f"| `{method} {route.path}` | {_first_line(route.endpoint)} |")
    return rows


def _first_line(function: Any) -> str:
    return " ".join((function.__doc__ or "").split("\n\n")[0].split())


def configuration() -> list[str]:
    """The `[server]` section with its comments, as settings.py has them."""
    source = inspect.getsource(ServerSection)
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in ServerSection.model_fields.items():
        line = next(line for line in source.splitlines() if re.match(rf"\s+{name}:", line))
        note = line.partition("  # ")[2]
        default = field.get_default()
        rows.append(f"| `server.{name}` | `{_json(default)}` | {note} |")
    return rows


def figures() -> list[str]:
    """The names that a scrape holds when something of everything has happened."""
    metrics = Metrics()
    visit = Visit("GET")
    visit.failed = "InputError"
    visit.first_token()
    metrics.visited(visit)
    text = metrics.text().decode()
    names = dict(re.findall(r"# HELP (\S+) (.*)", text))
    for call in inspect.getsource(Health).split("yield Reading(")[1:]:
        found = re.match(r'\s*"(\w+)",\s*"([^"]+)"', call)
        assert found is not None, call
        names[found[1] + ("_total" if '"counter"' in call else "")] = found[2]
    return ["| figure | |", "|---|---|"] + [
        f"| `{name}` | {said} |" for name, said in sorted(names.items()) if not name.endswith("_created")
    ]


TABLES = {
    "routes": routes,
    "chat parameters": lambda: parameters(ChatRequest),
    "responses parameters": lambda: parameters(ResponsesRequest),
    "messages parameters": lambda: parameters(MessagesRequest),
    "completion parameters": lambda: parameters(CompletionRequest),
    "settings": configuration,
    "figures": figures,
}


def _block(page: str, name: str) -> re.Match[str]:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert found is not None, f"{PAGE} has no table of {name}"
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_what_the_code_does(name: str) -> None:
    written = _block(PAGE.read_text(encoding="utf-8"), name)[1].splitlines()
    assert written == TABLES[name](), f"run python {Path(__file__).name}"


def test_every_table_is_checked() -> None:
    assert set(re.findall(r"<!-- (?!end)(.+?) -->", PAGE.read_text(encoding="utf-8"))) == set(TABLES)


def test_every_status_is_said() -> None:
    from agentgym.server import door, openai_errors

    page = PAGE.read_text(encoding="utf-8")
    source = inspect.getsource(openai_errors._status)
    for status, code in re.findall(r'Error, (\d{3}), (?:"(\w+)"|None)\)', source):
        assert status in page
        assert not code or f"`{code}`" in page, code
    for status in re.findall(r"_Refused\(\s*(\d{3})", inspect.getsource(door)):
        assert status in page, status


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for table, make in TABLES.items():
        block = _block(text, table)
        text = text[: block.start(1)] + "\n".join(make()) + text[block.end(1) :]
    PAGE.write_text(text, encoding="utf-8")
