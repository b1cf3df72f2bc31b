"""The trainer's door: msgpack in, msgpack out, one handler a request type. Waiting requests end at their timeout with
204, so that a client always gets to say what it waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from agentgym.errors import InputError, ServiceError
from agentgym.server import wire
from agentgym.server.service import RolloutService
from agentgym.server.wire import Done

T = TypeVar("T")


def trainer_router(service: RolloutService, stop: Callable[[], None]) -> APIRouter:
    """The routes under `/trainer`; `stop` ends the process in order."""
    router = APIRouter(prefix="/trainer")

    @router.get("/status")
    async def status() -> Response:
        return _answer(service.status())

    @router.post("/collect")
    async def collect(request: Request) -> Response:
        service.collector.collect((await _read(request, wire.CollectRequest)).running)
        return _answer(Done())

    @router.post("/restore")
    async def restore(request: Request) -> Response:
        service.collector.restore((await _read(request, wire.RestoreRequest)).data_position)
        return _answer(Done())

    @router.post("/batch")
    async def batch(request: Request) -> Response:
        asked = await _read(request, wire.BatchRequest)
        return _answer(await service.take_batch(asked.trainer_version, asked.timeout_s, asked.step))

    @router.post("/publish")
    async def publish(request: Request) -> Response:
        asked = await _read(request, wire.PublishRequest)
        return _answer(await service.publish(asked.version, asked.path, asked.probe))

    @router.post("/feed")
    async def feed(request: Request) -> Response:
        asked = await _read(request, wire.FeedRequest)
        return _answer(service.feed(asked.cursor, asked.max_tokens))

    @router.post("/pause")
    async def pause(request: Request) -> Response:
        return _answer(await service.pause((await _read(request, wire.PauseRequest)).limit_s))

    @router.post("/resume")
    async def resume() -> Response:
        await service.resume()
        return _answer(Done())

    @router.post("/acknowledge")
    async def acknowledge(request: Request) -> Response:
        service.acknowledge((await _read(request, wire.AcknowledgeRequest)).batch_id)
        return _answer(Done())

    @router.post("/evaluate")
    async def evaluate(request: Request) -> Response:
        asked = await _read(request, wire.EvaluateRequest)
        # the service checks `split`; on the wire it is any text
        evaluation_id = service.evaluate(asked.episodes, asked.split, asked.temperature, asked.seed)  # pyright: ignore[reportArgumentType]
        return _answer(wire.EvaluationTicket(evaluation_id))

    @router.get("/evaluations/{evaluation_id}")
    async def evaluation(evaluation_id: str, timeout_s: float = 0.0) -> Response:
        return _answer(await service.evaluation(evaluation_id, timeout_s))

    @router.post("/shutdown")
    async def shutdown() -> Response:
        stop()
        return _answer(Done())

    return router


async def _read(request: Request, kind: type[T]) -> T:
    try:
        return wire.decode(await request.body(), kind)
    except ServiceError as error:
        raise InputError(str(error)) from error


def _answer(value: Any) -> Response:
    if value is None:
        return Response(status_code=204)
    return Response(wire.encode(value), media_type=wire.CONTENT_TYPE)
