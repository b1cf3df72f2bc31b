"""How the service is: for people, for load balancers, for Prometheus. Law: asking costs next to nothing, never waits
for a busy engine longer than ENGINE_S, and says nothing about anybody's messages."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from agentgym import __version__
from agentgym.engine.protocol import EngineStats
from agentgym.errors import EngineError
from agentgym.server.door import Door
from agentgym.server.metrics import CONTENT_TYPE, Metrics, Reading
from agentgym.server.service import RolloutService

ENGINE_S = 2.0


@runtime_checkable
class _Replicated(Protocol):
    """An engine of several replicas."""

    def replicas(self) -> Sequence[Any]:
        """What each of them serves; data classes."""
        ...


class Health:
    """What is asked about a service and the door in front of it."""

    def __init__(self, service: RolloutService, metrics: Metrics) -> None:
        self.door: Door | None = None  # the door stands around the application, which this is a part of
        self._service = service
        self._metrics = metrics
        self._stats: EngineStats | None = None
        metrics.add(self._readings)

    def router(self) -> APIRouter:
        router = APIRouter()
        router.get("/health")(self.health)
        router.get("/health/live")(self.live)
        router.get("/health/ready")(self.ready)
        router.get("/metrics")(self.metrics)
        router.get("/v1/policy")(self.policy)
        return router

    async def live(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Whether requests are taken; 503 if not."""
        status = await self._status()
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def health(self) -> JSONResponse:
        """The state of everything; 503 where requests are not taken."""
        status = await self._status()
        stats = self._stats
        service = self._service
        engine = {"status": "ok" if stats else status, "running": 0, "waiting": 0}
        if stats:
            engine |= {"running": stats.running, "waiting": stats.waiting, "sampled_tokens": stats.sampled_tokens}
        body = {
            "status": status,
            "version": __version__,
            "model": service.model_name,
            "policy_version": service.policy.policy_version,
            "engine": engine,
            "replicas": [  # to anybody who asks: no addresses, no errors
                {"replica": number, "state": replica["state"], "policy_version": replica["policy_version"]}
                for number, replica in enumerate(self._replicas())
            ],
            "requests": self.door.running if self.door else 0,
            "sessions": service.sessions.num_open,
        }
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def policy(self) -> dict[str, Any]:
        """The policy that is served: its version, every replica's, and the last publication."""
        await self._status()
        policy = self._service.policy
        last = policy.publications.last
        pause, now = policy.pause_under_way, time.monotonic()
        return {
            "object": "policy",
            "model": self._service.model_name,
            "policy_version": policy.policy_version,
            "publishing": policy.publishing,
            "pause": pause
            and {"pause_id": pause.pause_id, "since_s": now - pause.since, "left_s": max(pause.until - now, 0.0)},
            "pauses": {"done": policy.pauses.done, "expired": policy.pauses.expired},
            "publications": {"done": policy.publications.done, "failed": policy.publications.failed},
            "last_publication": last
            and {
                "version": last.version,
                "mode": last.mode,
                "pause_s": last.pause_s,
                "total_s": last.total_s,
                "loaded_bytes": last.loaded_bytes,
            },
            "replicas": self._replicas(),
        }

    async def metrics(self) -> Response:
        """Everything that is counted."""
        await self._status()
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _status(self) -> str:
        """ok, draining, or what is wrong with the engine; leaves the engine's figures in `_stats`."""
        self._stats = None
        try:
            self._stats = await asyncio.wait_for(self._service.policy.engine.stats(), ENGINE_S)
        except TimeoutError:
            return "the engine does not answer"
        except EngineError:
            return "the engine is gone"
        if all(replica["state"] != "serving" for replica in self._replicas()):
            return "no replica serves"
        return "draining" if self.door is not None and self.door.draining else "ok"

    def _replicas(self) -> list[dict[str, Any]]:
        engine = self._service.policy.engine
        if isinstance(engine, _Replicated):
            return [dataclasses.asdict(replica) for replica in engine.replicas()]
        if self._stats is None:
            return []
        return [{"name": "engine", "state": "serving", "policy_version": self._stats.policy_version}]

    def _readings(self) -> Iterable[Reading]:
        policy = self._service.policy
        done = policy.publications
        yield Reading("agentgym_policy_version", "The policy version that is served.", policy.policy_version)
        yield Reading("agentgym_publications", "Publications.", done.done, {"result": "done"}, "counter")
        yield Reading("agentgym_publications", "Publications.", done.failed, {"result": "failed"}, "counter")
        yield Reading(
            "agentgym_publication_pause_seconds", "Seconds in which nothing was sampled.", done.pause_s, kind="counter"
        )
        yield Reading(
            "agentgym_publication_loaded_bytes", "Bytes that the engine loaded at publications.", done.loaded_bytes,
            kind="counter",
        )  # fmt: skip
        last = done.last.pause_s if done.last else 0.0
        yield Reading("agentgym_last_publication_pause_seconds", "The pause of the last publication.", last)
        yield Reading("agentgym_paused", "Whether a trainer has paused sampling.", float(bool(policy.pause_under_way)))
        pauses = policy.pauses
        yield Reading("agentgym_pauses", "Pauses.", pauses.done - pauses.expired, {"end": "asked"}, "counter")
        yield Reading("agentgym_pauses", "Pauses.", pauses.expired, {"end": "expired"}, "counter")
        yield Reading("agentgym_http_running", "Requests being answered.", self.door.running if self.door else 0)
        if self._stats is not None:
            stats = self._stats
            yield Reading("agentgym_engine_up", "Whether the engine answers.", 1)
            yield Reading("agentgym_engine_running", "Sequences being sampled.", stats.running)
            yield Reading("agentgym_engine_waiting", "Sequences that wait for a place.", stats.waiting)
            yield Reading(
                "agentgym_engine_sampled_tokens", "Tokens sampled, episodes' too.", stats.sampled_tokens, kind="counter"
            )
            yield Reading(
                "agentgym_engine_prefilled_tokens", "Tokens prefilled.", stats.prefilled_tokens, kind="counter"
            )
            yield Reading("agentgym_engine_busy_seconds", "Seconds spent computing.", stats.busy_s, kind="counter")
        else:
            yield Reading("agentgym_engine_up", "Whether the engine answers.", 0)
        for replica in self._replicas():
            serving = float(replica["state"] == "serving")
            labels = {"replica": replica["name"]}
            yield Reading("agentgym_replica_serving", "Whether a replica serves.", serving, labels)
            version = replica["policy_version"]
            yield Reading("agentgym_replica_policy_version", "The version that a replica serves.", version, labels)
        sessions = self._service.sessions
        yield Reading("agentgym_sessions_open", "Sessions that are open.", sessions.num_open)
        for state, count in sessions.ended.items():
            yield Reading("agentgym_sessions_ended", "Sessions that ended, by how.", count, {"state": state}, "counter")
