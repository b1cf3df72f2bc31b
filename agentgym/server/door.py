"""The door in front of the application: who may enter, how much, for how long, and how many at once.

Law: a bearer is compared before a body is read; no body is read beyond its limit or its time; every answer carries the
request's id; and a caller that goes away ends what was done for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import time
from asyncio import FIRST_COMPLETED
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentgym.server.connection import Connection, ConnectionLimits
from agentgym.server.keys import ACTOR, Keyring, Principal, bearers_of
from agentgym.server.logs import visiting
from agentgym.server.messages_errors import is_messages
from agentgym.server.metrics import Metrics
from agentgym.server.openai_errors import RETRY_AFTER_S, is_trainers, refusal
from agentgym.server.settings import ServerSection
from agentgym.server.visit import Visit

log = logging.getLogger(__name__)
access = logging.getLogger("agentgym.server.access")
CLIENT_GONE = 499  # what nginx writes; nobody receives it
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
_SESSION_READS = re.compile(r"/v1(/sessions/[^/]+)?/models(/.*)?|/v1/sessions/[^/]+")
_SESSION_CHATS = re.compile(
    r"/v1(/sessions/[^/]+)?/(chat/completions|responses|messages(/count_tokens)?)"
    r"|/v1/sessions/[^/]+/v1/messages(/count_tokens)?"
)
SHARES = 4  # no session's bearer has more than such a part of the requests that run: an agent may be hostile
CUT_S = 1.0  # for requests that are cut off to say so
WAITING_REPORT_S = 2.0  # between two lines on what a drain waits for


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests may use. Example: `Limits.of(ServerSection())`."""

    max_body_bytes: int
    max_body_s: float  # for a body to arrive
    max_requests: int  # POSTs under `/v1` that are answered at once
    max_request_s: float  # for an answer to be sampled
    connection: ConnectionLimits

    @classmethod
    def of(cls, section: ServerSection) -> Limits:
        connection = ConnectionLimits(section.max_connections, section.max_head_s, section.max_read_s)
        return cls(
            section.max_body_mb * 2**20, section.max_body_s, section.max_requests, section.max_request_s, connection
        )


class _Refused(Exception):
    def __init__(self, status: int, kind: str, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Door:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, keyring: Keyring, limits: Limits, metrics: Metrics) -> None:
        self.draining = False
        self._app = app
        self._keyring = keyring
        self._limits = limits
        self._metrics = metrics
        self._running: dict[str, Visit] = {}  # POSTs under `/v1`
        self._of_session: Counter[str] = Counter()  # those of them that came with a session's bearer
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut = asyncio.Event()  # the drain's time is over

    @property
    def running(self) -> int:
        return len(self._running)

    def connection(self, **uvicorns: Any) -> Connection:
        """A connection to come through, made of what uvicorn gives one."""
        return Connection(self._limits.connection, self._metrics.failed, **uvicorns)

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> bool:
        """Takes no more requests under `/v1`, and waits until those that run have ended; cuts them off and is False at
        the limit, or when it is to hurry."""
        self.draining = True
        began = time.monotonic()
        hurrying = asyncio.create_task(hurry.wait())
        while self._running and not hurry.is_set() and (left := began + limit_s - time.monotonic()) > 0.0:
            oldest = max(self._running.values(), key=lambda visit: visit.seconds)
            log.info(
                "draining: %d requests run, the oldest (%s %s) for %.1f s; waiting %.1f s at most",
                len(self._running), oldest.route, oldest.request_id, oldest.seconds, left,
            )  # fmt: skip
            idle = asyncio.create_task(self._idle.wait())
            await asyncio.wait((idle, hurrying), timeout=min(left, WAITING_REPORT_S), return_when=FIRST_COMPLETED)
            idle.cancel()
        hurrying.cancel()
        if not self._running:
            return True
        log.warning("drained for %.1f s; %d requests are cut off", time.monotonic() - began, len(self._running))
        self._cut.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), CUT_S)
        return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        visit = Visit(scope["method"])
        sender = _Sender(visit, scope["path"], send)
        with visiting(visit):
            visit.after.callback(self._end, visit, scope)  # the last of all that is put away
            try:
                await self._visit(visit, scope, receive, sender)
            except _Refused as refused:
                visit.failed = refused.kind
                answer = _answer(scope["path"], refused)
                await answer(scope, receive, sender)
            except asyncio.CancelledError:
                visit.failed = visit.failed or "Disconnected"
                visit.status = visit.status or CLIENT_GONE
                if not sender.gone:
                    raise
            finally:
                await visit.after.aclose()

    async def _visit(self, visit: Visit, scope: Scope, receive: Receive, sender: _Sender) -> None:
        path: str = scope["path"]
        headers = dict(scope["headers"])
        visit.principal = self._identify(path, headers)
        scope.setdefault("state", {}).update(visit=visit, principal=visit.principal)
        surface = path == "/v1" or path.startswith("/v1/")
        if surface:
            if self.draining:
                raise _ending()
            self._check_may(visit, scope["method"], path)
            if scope["method"] == "POST":
                self._admit(visit)
        # nobody's bearer is asked for at the open paths, so that what a stranger sends there is not read
        body = b"" if visit.principal is None else await self._body(headers, receive)
        if surface:
            await self._until_gone(scope, body, receive, sender)
        else:
            await self._app(scope, _replay(body, receive), sender)

    # ------------------------------------------------------------------------------------------------------ checks

    def _identify(self, path: str, headers: dict[bytes, bytes]) -> Principal | None:
        if path in OPEN_PATHS:
            return None
        bearer, other = bearers_of(headers, with_api_key=not is_trainers(path))
        if other is not None:  # one of them may be a session's, whose requests must not go on unrecorded
            raise _Refused(401, "ServiceError", "Authorization and x-api-key differ; send one", "invalid_api_key")
        principal = self._keyring.identify(bearer)
        trainer = principal is not None and principal.role == "trainer"
        if principal is None or trainer != is_trainers(path):
            also = "" if is_trainers(path) else " or 'x-api-key: KEY'"
            raise _Refused(
                401, "ServiceError", f"this needs the header 'Authorization: Bearer KEY'{also}", "invalid_api_key",
                www_authenticate="Bearer",
            )  # fmt: skip
        if principal == ACTOR and self._keyring.keys.openai is None and not _names_no_domain(headers.get(b"host", b"")):
            raise _Refused(
                403, "ServiceError", "without server.api_key_file this server is asked as localhost or by its address",
                "forbidden_host",
            )  # fmt: skip
        if principal.role == "session" and not path.startswith("/v1/"):
            raise _Refused(403, "ServiceError", "a session's key is for its session alone", "forbidden")
        return principal

    def _check_may(self, visit: Visit, method: str, path: str) -> None:
        """A session's bearer is in the hands of the policy's agent: it chats, and looks at its session."""
        if visit.principal is None or visit.principal.role != "session":
            return
        allowed = _SESSION_READS if method in ("GET", "HEAD") else _SESSION_CHATS if method == "POST" else None
        if allowed is None or not allowed.fullmatch(path):  # whose session the path names, its handler looks at
            raise _Refused(403, "ServiceError", "a session's key chats, and sees its own session", "forbidden")

    def _admit(self, visit: Visit) -> None:
        if len(self._running) >= self._limits.max_requests:
            raise _Refused(
                429, "NotNowError", f"{len(self._running)} requests run, as many as server.max_requests allows",
                "rate_limit_exceeded", retry_after=str(RETRY_AFTER_S),
            )  # fmt: skip
        session_id = visit.principal.session_id if visit.principal else None
        if session_id is not None:
            share = max(1, self._limits.max_requests // SHARES)
            if self._of_session[session_id] >= share:
                raise _Refused(
                    429, "NotNowError", f"{share} requests of this session run; the others' places are not its own",
                    "rate_limit_exceeded", retry_after=str(RETRY_AFTER_S),
                )  # fmt: skip
            self._of_session[session_id] += 1
        self._running[visit.request_id] = visit
        self._idle.clear()

    def _end(self, visit: Visit, scope: Scope) -> None:
        self._leave(visit)
        self._note(visit, scope)

    def _leave(self, visit: Visit) -> None:
        if self._running.pop(visit.request_id, None) is None:
            return
        session_id = visit.principal.session_id if visit.principal else None
        if session_id is not None:
            self._of_session[session_id] -= 1
            if not self._of_session[session_id]:
                del self._of_session[session_id]
        if not self._running:
            self._idle.set()

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises _Refused for one that is too big or too slow."""
        most = self._limits.max_body_bytes
        too_big = _Refused(413, "InputError", f"a request body may have at most {most} bytes", "body_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise too_big
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.max_body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Refused(400, "Disconnected", "the connection was closed in the middle of a body")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_big
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            limit = f"{self._limits.max_body_s:g} s"
            raise _Refused(
                408, "InputError", f"the body did not arrive within {limit}", "body_timeout", connection="close"
            ) from None

    # ------------------------------------------------------------------------------------------------------ running

    async def _until_gone(self, scope: Scope, body: bytes, receive: Receive, sender: _Sender) -> None:
        """Runs the application, and cancels it when the caller closes the connection before it has its answer."""
        working = asyncio.ensure_future(self._app(scope, _replay(body, _never), sender))
        watching = asyncio.create_task(_disconnected(receive))
        cut = asyncio.create_task(self._cut.wait())
        try:
            await asyncio.wait((working, watching, cut), return_when=FIRST_COMPLETED)
            if not working.done() and not sender.complete:
                sender.gone = watching.done() or sender.started
                working.cancel()
                if not sender.gone:
                    raise _ending()
            await working
        finally:
            for task in (working, watching, cut):
                task.cancel()
            await asyncio.gather(working, watching, cut, return_exceptions=True)

    def _note(self, visit: Visit, scope: Scope) -> None:
        route = scope.get("route")
        visit.route = getattr(route, "path", visit.route)
        self._metrics.visited(visit)
        if visit.route in OPEN_PATHS or visit.route == "/metrics":
            return
        who = visit.principal.role if visit.principal else "nobody"
        access.info(
            "%s %s %d %.1f ms, %d tokens%s", visit.method, visit.route, visit.status, visit.seconds * 1000.0,
            visit.sampled_tokens, f", {visit.failed}" if visit.failed else "",
            extra={
                "method": visit.method, "route": visit.route, "status": visit.status, "principal": who,
                "seconds": round(visit.seconds, 6), "prompt_tokens": visit.prompt_tokens,
                "sampled_tokens": visit.sampled_tokens, "failed": visit.failed,
            },
        )  # fmt: skip


class _Sender:
    """`send` that puts the request's id on the answer and sees how far it got."""

    def __init__(self, visit: Visit, path: str, send: Send) -> None:
        self.started = False
        self.complete = False
        self.gone = False  # the caller closed the connection
        self._visit = visit
        # Anthropic's client looks for another header than OpenAI's
        self._names = (b"x-request-id", b"request-id") if is_messages(path) else (b"x-request-id",)
        self._send = send

    async def __call__(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self.started = True
            self._visit.status = message["status"]
            request_id = self._visit.request_id.encode()
            headers = [*message.get("headers", ()), *((name, request_id) for name in self._names)]
            message = {**message, "headers": headers}
        self.complete = self.complete or last
        await self._send(message)
        if last and self._visit.status < 400 and not self._visit.failed:
            for sent in self._visit.when_sent:
                sent()
        if last:  # at once: the caller has its answer; its next request must find all put away, counted, its place free
            await self._visit.after.aclose()


def _names_no_domain(host: bytes) -> bool:
    """Whether a Host header is what nobody can register. A page in a browser may have its own domain point here (DNS
    rebinding), and could then do whatever needs no key."""
    name = host.decode("latin-1").partition(":")[0].rstrip(".").lower()
    if host.startswith(b"[") or "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _ending() -> _Refused:
    return _Refused(
        503, "ServiceError", "the server is ending; ask another one", "draining",
        retry_after=str(RETRY_AFTER_S), connection="close",
    )  # fmt: skip


def _replay(body: bytes, after: Receive) -> Receive:
    """`receive` of a body that was read already."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return await after()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _never() -> Message:
    """What follows a body whose end the door watches itself."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _answer(path: str, refused: _Refused) -> Response:
    return refusal(path, refused.status, refused.kind, str(refused), code=refused.code, headers=refused.headers)
