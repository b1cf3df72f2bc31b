"""How a trainer talks to the rollout service: plain blocking calls, and the service as a child process.

Law: no call waits without a bound and without being able to say what it waits for; a service that died ends the wait
with the end of its log. A child never outlives its parent, however the parent ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from agentgym.errors import AgentGymError, InputError, ServiceError, UnavailableError
from agentgym.server import wire
from agentgym.server.settings import ServiceConfig
from agentgym.server.wire import Batch, Evaluation, FeedPage, PauseReport, PublishReport, ServiceStatus

POLL_S = 5.0  # how long one request of a long wait may take
STARTUP_S = 180.0  # loading transformers, the model and, for sandboxes, Docker
ENDING_S = 60.0  # what the service gets to close its environments before it is killed; more than it gives itself
DYING_S = 1.0  # for one that was silent, and may live
LOG_LINES = 25

T = TypeVar("T")
OnWait = Callable[[ServiceStatus], None]


class ServiceClient:
    """One rollout service. Failures of the service arrive as the errors that it raised; one that cannot be reached,
    or is gone, as ServiceError.

    `explain_death` says why the service is gone, or None if it lives for so many seconds more; `start_service` has one.
    """

    def __init__(
        self, url: str, key: str, *, timeout_s: float = 60.0, explain_death: Callable[[float], str | None] | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._timeout_s = timeout_s
        self._explain_death = explain_death or (lambda within_s: None)
        self._http = httpx.Client(
            base_url=f"{self.url}/trainer",
            headers={"Authorization": f"Bearer {key}", "Content-Type": wire.CONTENT_TYPE},
            timeout=timeout_s,
            trust_env=False,  # a proxy of the machine has no business between trainer and service
        )

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the service goes on."""
        self._http.close()

    def another(self) -> ServiceClient:
        """A second connection to the same service, for another thread; to be closed like this one."""
        return ServiceClient(self.url, self._key, timeout_s=self._timeout_s, explain_death=self._explain_death)

    # ------------------------------------------------------------------------------------------------- questions

    def status(self) -> ServiceStatus:
        return self._get("/status", ServiceStatus)

    def wait_ready(self, timeout_s: float = STARTUP_S) -> ServiceStatus:
        """Waits until the service answers. Raises ServiceError at the deadline, or at once if the key is refused."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.status()
            except ServiceError as error:
                if not isinstance(error.__cause__, httpx.TransportError):
                    raise  # it answered, or its process is dead
                if time.monotonic() >= deadline:
                    raise ServiceError(f"no rollout service answered at {self.url} within {timeout_s:.0f} s") from error
            time.sleep(0.1)

    # ---------------------------------------------------------------------------------------------------- orders

    def collect(self, running: bool) -> None:
        """Starts or pauses collecting; running episodes go on to their end."""
        self._post("/collect", wire.CollectRequest(running), wire.Done)

    def take_batch(
        self,
        trainer_version: int,
        timeout_s: float | None = None,
        on_wait: OnWait | None = None,
        step: int | None = None,
    ) -> Batch:
        """The next `groups_per_step` groups within the staleness bound, waited for.

        Their trajectories are stored as those of `step` (default: `trainer_version + 1`). `on_wait` is told the
        service's status every few seconds of waiting. Raises ServiceError at `timeout_s` (None: as long as the service
        lives and its episodes finish), naming what it waited for; and what keeps the service from collecting any more
        (the engine died, every episode fails).
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            request = wire.BatchRequest(trainer_version, max(left, 0.0), trainer_version + 1 if step is None else step)
            batch = self._post("/batch", request, Batch, optional=True)
            if batch is not None:
                return batch
            self._report(on_wait, deadline, "a batch")

    def publish(self, version: int, path: Path, probe: wire.Probe | None = None) -> PublishReport:
        """Has the engine serve the weights in `path`, a file in the versions folder that the service was started
        with, and compare itself with `probe`. Raises VersionError if `version` is not newer than the one served,
        EngineError if it cannot be loaded, or if no server of the engine agrees with the probe."""
        return self._post("/publish", wire.PublishRequest(version, str(path), probe), PublishReport)

    def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage:
        """What the token rows of buffered and in-flight trajectories grew by since `cursor`, completions up to their
        last interruption included; at most `max_tokens`, or one piece. `live is None` says that more is there."""
        return self._post("/feed", wire.FeedRequest(cursor, max_tokens), FeedPage)

    def pause(self, limit_s: float) -> PauseReport:
        """Interrupts all sampling until the next publication or `resume`; by itself it ends after `limit_s`, so that a
        trainer may crash. During a pause: gives it `limit_s` more from now on, and returns the same `pause_id`; another
        id says that sampling went on in between."""
        return self._post("/pause", wire.PauseRequest(limit_s), PauseReport)

    def resume(self) -> None:
        """Ends a pause without a publication."""
        self._post("/resume", wire.Done(), wire.Done)

    def acknowledge(self, batch_id: str) -> None:
        """Says that a durable checkpoint contains this batch's update; the service forgets the batch."""
        self._post("/acknowledge", wire.AcknowledgeRequest(batch_id), wire.Done)

    def restore(self, data_position: Mapping[str, Any]) -> None:
        """Continues the data order where a checkpoint's `Batch.data_position` stands; before the first `collect`."""
        self._post("/restore", wire.RestoreRequest(data_position), wire.Done)

    def evaluate(
        self,
        episodes: int,
        split: Literal["train", "heldout"] = "heldout",
        temperature: float = 1.0,
        seed: int = 0,
        on_wait: OnWait | None = None,
    ) -> Evaluation:
        """Plays `episodes` of `split` under the version now served; the same arguments mean the same tasks."""
        request = wire.EvaluateRequest(episodes, split, temperature, seed)
        ticket = self._post("/evaluate", request, wire.EvaluationTicket)
        while True:
            path = f"/evaluations/{ticket.evaluation_id}?timeout_s={POLL_S}"
            result = self._get(path, Evaluation, optional=True)
            if result is not None:
                return result
            self._report(on_wait, None, "an evaluation")

    def shutdown(self) -> None:
        """Ends the service: episodes, environments, sandboxes, engine."""
        self._post("/shutdown", wire.Done(), wire.Done)

    # --------------------------------------------------------------------------------------------------- plumbing

    def _report(self, on_wait: OnWait | None, deadline: float | None, what: str) -> None:
        late = deadline is not None and time.monotonic() >= deadline
        if not late and on_wait is None:
            return
        status = self.status()
        if late:
            raise ServiceError(f"waited in vain for {what}: {status.waiting_for}")
        if on_wait is not None:
            on_wait(status)

    def _get(self, path: str, kind: type[T], optional: bool = False) -> Any:
        return self._answer(lambda: self._http.get(path), kind, optional)

    def _post(self, path: str, body: Any, kind: type[T], optional: bool = False) -> Any:
        return self._answer(lambda: self._http.post(path, content=wire.encode(body)), kind, optional)

    def _answer(self, send: Callable[[], httpx.Response], kind: type[T], optional: bool) -> T | None:
        try:
            response = send()
        except httpx.TransportError as error:
            # a service closes its connections before it ends, and then ends in order; one that says nothing may live
            within_s = DYING_S if isinstance(error, httpx.TimeoutException) else ENDING_S
            if (death := self._explain_death(within_s)) is not None:
                raise ServiceError(f"the rollout service is gone: {death}") from None
            raise ServiceError(
                f"the rollout service at {self.url} does not answer: {type(error).__name__}: {error}"
            ) from error
        if optional and response.status_code == 204:
            return None
        if response.status_code == 200:
            return wire.decode(response.content, kind)
        if response.headers.get("content-type") == wire.CONTENT_TYPE:
            raise wire.from_fault(wire.decode(response.content, wire.Fault))
        raise ServiceError(f"the rollout service answered {response.status_code}: {response.text[:300]}")


# ------------------------------------------------------------------------------------------------ the child process


@contextlib.contextmanager
def start_service(
    config: ServiceConfig, model_folder: Path, run_dir: Path, versions_dir: Path, *, startup_s: float | None = None
) -> Iterator[ServiceClient]:
    """Starts `python -m agentgym.server` as a child, and ends it when the block ends; if this process is killed, the
    child notices and ends itself. Its output goes to `run_dir/service.log`.

    Raises the error that kept the service from starting (InputError and its kin keep their class), or ServiceError
    with the end of the log.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    versions_dir.mkdir(parents=True, exist_ok=True)
    child = _Child(config, model_folder, run_dir, versions_dir)
    try:
        url, key = child.wait_ready(_startup_s(config) if startup_s is None else startup_s)
        with ServiceClient(url, key, explain_death=child.explain_death) as client:
            yield client
    finally:
        child.end()


def _startup_s(config: ServiceConfig) -> float:
    """Servers of vLLM have their own time limit, which says more than ours."""
    return STARTUP_S + (config.engine.vllm_start_s if config.engine.kind == "vllm" else 0.0)


class _Child:
    """The service process, and the two pipes to it: one it reports on, one whose end tells it to end."""

    def __init__(self, config: ServiceConfig, model_folder: Path, run_dir: Path, versions_dir: Path) -> None:
        self.log = run_dir / "service.log"
        config_file = run_dir / "service.json"
        ready_read, ready_write = os.pipe()
        try:
            config_file.write_text(config.model_dump_json(indent=2), encoding="utf-8")
            command = [
                *(sys.executable, "-m", "agentgym.server", "--config", str(config_file), "--model", str(model_folder)),
                *("--run-dir", str(run_dir), "--versions-dir", str(versions_dir), "--ready-fd", str(ready_write)),
            ]
            with self.log.open("ab") as log:
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(ready_write,),
                    start_new_session=True,  # Ctrl-C is the parent's; the child ends when the parent says so
                )  # fmt: skip
        except OSError as error:
            os.close(ready_read)
            raise UnavailableError(f"the rollout service cannot start in {run_dir}: {error.strerror}") from error
        finally:
            os.close(ready_write)
        self._ready = ready_read

    def wait_ready(self, timeout_s: float) -> tuple[str, str]:
        """(url, key), which the child writes to the pipe: never in its arguments, where other users could read it."""
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([self._ready], [], [], max(deadline - time.monotonic(), 0.0))
            if not readable:
                raise ServiceError(f"the rollout service was not ready within {timeout_s:.0f} s\n{self._tail()}")
            part = os.read(self._ready, 65536)
            if not part:
                raise ServiceError(f"the rollout service did not start: {self.explain_death(ENDING_S) or 'it hangs'}")
            line += part
        hello = json.loads(line)
        if "kind" in hello:
            raise _started_badly(hello)
        return hello["url"], hello["key"]

    def explain_death(self, within_s: float) -> str | None:
        """Asked after a connection broke, which happens before the process has ended."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}\n{self._tail()}"

    def _tail(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode("utf-8", "replace").splitlines()
        except OSError as error:
            return f"({self.log} cannot be read: {error.strerror})"
        return "\n".join([f"end of {self.log}:", *lines[-LOG_LINES:]]) if lines else f"({self.log} is empty)"

    def end(self) -> None:
        """Closing its stdin asks the child to end in order; what does not end is killed."""
        os.close(self._ready)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _started_badly(hello: Mapping[str, Any]) -> AgentGymError:
    error = wire.from_fault(wire.Fault(str(hello["kind"]), str(hello["message"])))
    return error if isinstance(error, InputError) else ServiceError(f"the rollout service did not start: {error}")
