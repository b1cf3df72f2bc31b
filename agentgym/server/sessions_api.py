"""The routes of sessions. Law: whoever may act opens and ends sessions. A session's own bearer, which is in the hands
of the policy's agent, sees what that session has used and nothing else (neither its task, whose name may be the answer,
nor its score), and neither ends it nor says what it earned.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from agentgym.rollout.intake import Declared
from agentgym.server.keys import Keyring, Principal
from agentgym.server.openai_errors import ForbiddenError
from agentgym.server.openai_route import StrictJson
from agentgym.server.sessions import Sessions, SessionView
from agentgym.server.sessions_errors import UnknownSessionError
from agentgym.server.visit import Visit

AGENTS_OWN = ("id", "object", "status", "turns", "undelivered", "sampled_tokens", "expires_in_s")
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Limits(_Body):
    """What a session may use; never more than the service's `[sessions]` section says."""

    max_turns: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)


class OpenRequest(_Body):
    """Siblings of one group agree in task, seed and group."""

    task: Name
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    group: str = Field(default="", max_length=1000)
    ttl_s: FiniteFloat | None = Field(default=None, gt=0.0)
    limits: Limits = Limits()


class FinishRequest(_Body):
    """What the episode earned, by component; their sum is its reward. `invalid` says why nobody knows."""

    components: dict[Name, FiniteFloat] = Field(default_factory=dict, max_length=100)
    status: Literal["terminated", "truncated"] = "terminated"
    invalid: str | None = Field(default=None, min_length=1, max_length=1000)


def sessions_router(sessions: Sessions, keyring: Keyring, model_name: str) -> APIRouter:
    """The routes under `/v1/sessions`."""
    router = APIRouter(prefix="/v1/sessions", route_class=StrictJson)
    sessions.on_forget = keyring.revoke

    @router.post("", status_code=201)
    async def begin(body: OpenRequest, request: Request) -> dict[str, Any]:
        """Opens a recorded episode, and gives its agent a bearer and a base URL of its own."""
        _check_acts(request)
        session = sessions.open(
            Declared(body.task, body.seed, body.group),
            ttl_s=body.ttl_s,
            max_turns=body.limits.max_turns,
            max_tokens=body.limits.max_tokens,
        )
        base_url = f"{str(request.base_url).rstrip('/')}/v1/sessions/{session.name}"
        key = keyring.admit(session.name)  # shown once; the service keeps its digest
        return _view(session.view()) | {"api_key": key, "base_url": base_url, "model": model_name}

    @router.get("/{session_id}")
    async def show(session_id: str, request: Request) -> dict[str, Any]:
        """What a session has used and how it stands."""
        principal = _principal(request)
        _check_sees(principal, session_id)
        shown = _view(sessions.view(session_id))
        return shown if principal.role == "actor" else {name: shown[name] for name in AGENTS_OWN}

    @router.post("/{session_id}/finish")
    async def finish(session_id: str, body: FinishRequest, request: Request) -> dict[str, Any]:
        """Ends a session with what it earned."""
        _check_acts(request)
        truncated = body.status == "truncated"
        return _view(await sessions.finish(session_id, body.components, truncated=truncated, invalid=body.invalid))

    @router.delete("/{session_id}")
    async def abandon(session_id: str, request: Request) -> dict[str, Any]:
        """Ends a session without a score; its place in its group is free again."""
        _check_acts(request)
        return _view(sessions.abandon(session_id))

    return router


def _principal(request: Request) -> Principal:
    visit: Visit = request.state.visit
    assert visit.principal is not None  # the door lets nobody else in
    return visit.principal


def _check_acts(request: Request) -> None:
    if _principal(request).role != "actor":
        raise ForbiddenError("sessions are opened and ended with the acting key, never with a session's own bearer")


def _check_sees(principal: Principal, session_id: str) -> None:
    if principal.role == "session" and session_id != principal.session_id:
        raise UnknownSessionError(f"there is no session {session_id!r}")  # nor is it said whether there is one


def _view(view: SessionView) -> dict[str, Any]:
    score = None
    if view.score is not None:
        score = {"value": view.score.value, "components": dict(view.score.components), "valid": view.score.valid}
    return {
        "id": view.session_id,
        "object": "session",
        "status": view.state.value,
        "task": view.task_id,
        "seed": view.seed,
        "group": view.group,
        "trains": view.trains,
        "turns": view.turns,
        "undelivered": view.undelivered,
        "sampled_tokens": view.sampled_tokens,
        "links": dict(view.links),
        "expires_in_s": round(view.left_s, 3),
        "score": score,
    }
