"""The HTTP application: the OpenAI surface, sessions, the trainer's routes, health, and the door in front of them."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from agentgym import __version__
from agentgym.server.door import Door, Limits
from agentgym.server.health import Health
from agentgym.server.keys import Keyring, Principal
from agentgym.server.messages_api import MessagesSurface
from agentgym.server.metrics import Metrics
from agentgym.server.openai_answering import Answering, ConversationOf
from agentgym.server.openai_api import OpenAiSurface
from agentgym.server.openai_errors import add_handlers
from agentgym.server.replies import Conversation, Replies, Unrecorded
from agentgym.server.responses_api import ResponsesSurface
from agentgym.server.service import RolloutService
from agentgym.server.sessions_api import sessions_router
from agentgym.server.sessions_errors import UnknownSessionError
from agentgym.server.trainer_api import trainer_router


def create_app(service: RolloutService, keyring: Keyring, stop: Callable[[], None], limits: Limits) -> Door:
    """The application around `service`; `stop` is what the trainer's shutdown calls."""
    replies = Replies(service.policy, service.renderer, service.max_context, limits.max_request_s)
    answering = Answering(service.model_name, service.vocab_size, replies, conversation_of(service))
    metrics = Metrics()
    health = Health(service, metrics)
    app = FastAPI(title="agentgym rollout service", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(OpenAiSurface(answering).router())
    app.include_router(ResponsesSurface(answering).router())
    app.include_router(MessagesSurface(answering).router())
    app.include_router(sessions_router(service.sessions, keyring, service.model_name))
    app.include_router(trainer_router(service, stop), include_in_schema=False)  # msgpack, for our own client
    app.include_router(health.router())
    add_handlers(app)
    door = health.door = Door(app, keyring, limits, metrics)
    return door


def conversation_of(service: RolloutService) -> ConversationOf:
    """Which conversation a request is part of: the session of its bearer or of its path, or none."""
    unrecorded = Unrecorded(service.renderer)

    def find(principal: Principal, session_id: str | None) -> Conversation:
        own = principal.session_id
        if own is not None and session_id not in (None, own):
            raise UnknownSessionError(f"there is no session {session_id!r}")  # nor is it said whether there is one
        wanted = own or session_id
        return unrecorded if wanted is None else service.sessions.get(wanted)

    return find
