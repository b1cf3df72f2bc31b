"""The images that a daemon holds. Law: a tag appears when all of its image is there, and one content is built once,
however many ask for it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker.errors

from agentgym.errors import ImageError, SandboxError, UnavailableError
from agentgym.sandbox.docker.host import FAILURES, OWN_SOCKET, Daemon, DockerHost, connect, root_cause
from agentgym.sandbox.docker.image_context import Context, bases_of, read_context
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.spec import BASE_IMAGE

BUILD = "python -m agentgym.sandbox.base_image"
REPOSITORY = "agentgym/task"
TASK_LABEL = "agentgym.image=task"
LAST_LINES = 12
BUILD_S = 3600.0
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TaskImage:
    """An image that was built for a task. Example: `TaskImage("agentgym/task:3f2a", "maze", 1.7e9, 118000000)`."""

    tag: str
    folder: str  # the name of the folder it was built from
    created: float  # seconds since 1970
    num_bytes: int


def build_image(
    folder: Path | str,
    *,
    host: DockerHost | None = None,
    report: Report | None = None,
    shared: bool = True,
    timeout_s: float = BUILD_S,
) -> str:
    """The tag of the image of a folder with a Dockerfile, built unless the daemon has it. The tag names the content, so
    whoever has the same folder gets the same image. `shared=False`: it is this process's alone, by its tag as well,
    and is removed when this process ends."""
    say = report or _silent
    context = read_context(Path(folder))
    daemon = connect(host)
    bases = {name: _base_id(daemon, name, context.folder, say) for name in bases_of(context.dockerfile)}
    tag = f"{REPOSITORY}:{context.digest(bases)}"
    if not shared:  # one that several used would go with the first of them
        tag += f"-{owner().owner_id}"
    with _lock_of(f"{daemon.host.url or OWN_SOCKET} {tag}", tag, say):
        if daemon.has_image(tag):
            say(f"{tag} exists already")
            return tag
        _build(daemon, context, tag, say, shared, timeout_s)
    return tag


def task_images(host: DockerHost | None = None) -> list[TaskImage]:
    """Those that `build_image` made and nobody removed yet."""
    found = connect(host).quick.images(filters={"label": TASK_LABEL})
    return [
        TaskImage(tag, (image.get("Labels") or {}).get("agentgym.folder", ""), float(image["Created"]), image["Size"])
        for image in found
        for tag in image.get("RepoTags") or ()
        if tag.startswith(f"{REPOSITORY}:")
    ]


def remove_image(tag: str, host: DockerHost | None = None) -> bool:
    """Whether it was there. One that a box runs on is a SandboxError."""
    try:
        connect(host).api.remove_image(tag)
    except docker.errors.ImageNotFound:
        return False
    except FAILURES as error:
        raise SandboxError(f"the image {tag} cannot be removed: {root_cause(error)}") from error
    return True


def has_image(image: str, host: DockerHost | None = None) -> bool:
    """Whether the daemon holds the image; UnavailableError without a daemon."""
    return connect(host).has_image(image)


def daemon_architecture(host: DockerHost | None = None) -> str:
    """What the daemon's machine is, in Docker's words: "amd64", "arm64"."""
    return connect(host).architecture


def missing(image: str, daemon: Daemon) -> str:
    """What to say of an image that is not there."""
    if image == BASE_IMAGE:
        return f"the image {image} is not built yet; build it with: {BUILD}"
    return (
        f"the image {image} is not known to the Docker daemon at {daemon.host.shown}; build or pull it (the base image "
        f"is built with: {BUILD})"
    )


def import_image(
    chunks: Iterator[bytes], image: str, labels: Mapping[str, str], host: DockerHost | None = None
) -> None:
    """Makes an image of a tar stream. The tag appears when all of it has arrived, or not at all."""
    repository, _, tag = image.rpartition(":")
    changes = [f"LABEL {key}={value}" for key, value in labels.items()]
    daemon = connect(host)
    client = daemon.builder
    old = client.inspect_image(image)["Id"] if daemon.has_image(image) else None
    try:
        answer = client.import_image_from_stream(chunks, repository, tag, changes)
    except FAILURES as error:
        if isinstance(error, SandboxError):
            raise
        raise SandboxError(f"the Docker daemon did not take the image {image}: {error}") from error
    if not daemon.has_image(image):
        raise SandboxError(f"the Docker daemon did not make the image {image}: {answer!s:.500}")
    if old:
        with contextlib.suppress(docker.errors.APIError):  # it has another name, or a box still runs on it
            client.remove_image(old)


# ------------------------------------------------------------------------------------------------------------ building


def _build(daemon: Daemon, context: Context, tag: str, say: Report, shared: bool, timeout_s: float) -> None:
    labels = {"agentgym.image": "task", "agentgym.folder": context.folder.name}
    if not shared:
        labels |= owner().image_labels()
    say(f"building {tag} from {context.folder}")
    with tempfile.TemporaryFile() as tar:
        context.write_tar(tar)
        tar.seek(0)
        try:
            lines = daemon.builder.build(
                fileobj=tar, custom_context=True, tag=tag, labels=labels, rm=True, forcerm=True, decode=True
            )
            _follow(lines, context, say, time.monotonic() + timeout_s)
        except FAILURES as error:
            if isinstance(error, SandboxError):
                raise
            said = error.explanation if isinstance(error, docker.errors.APIError) else root_cause(error)
            raise ImageError(f"the image of {context.folder} cannot be built: {said}") from error
    if not daemon.has_image(tag):
        raise ImageError(f"the image of {context.folder} was built, but the Docker daemon does not know it as {tag}")


def _follow(lines: Iterable[Any], context: Context, say: Report, until: float) -> None:
    """Tells what the build says; ImageError with its last lines if it fails."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    for line in lines:
        text = str(line.get("stream") or line.get("status") or "") if isinstance(line, dict) else str(line)
        for part in text.splitlines():
            if part.strip():
                say(part.rstrip())
                if not part.startswith(("Removing intermediate", " ---> ")):  # what the builder says of itself
                    last.append(part.rstrip())
        error = line.get("error") if isinstance(line, dict) else None
        if time.monotonic() > until:
            error = error or "it took too long"
        if error:
            raise ImageError(
                f"the image of {context.folder} cannot be built: {error}. Its last lines:\n" + "\n".join(last)
            )


def _base_id(daemon: Daemon, image: str, folder: Path, say: Report) -> str:
    """The id of the image that a Dockerfile builds upon; pulled if it is not there, and if it is no image of ours."""
    try:
        return str(daemon.quick.inspect_image(image)["Id"])
    except docker.errors.ImageNotFound:
        pass
    except FAILURES as error:
        raise ImageError(f"the Dockerfile of {folder} builds on {image!r}: {root_cause(error)}") from error
    if image.startswith("agentgym/"):
        raise UnavailableError(f"the Dockerfile of {folder} builds on another: {missing(image, daemon)}")
    say(f"pulling {image}")
    repository, _, tag = image.partition("@") if "@" in image else image.rpartition(":")
    if not repository or "/" in tag:
        repository, tag = image, "latest"
    try:
        for line in daemon.builder.pull(repository, tag, stream=True, decode=True):
            if isinstance(line, dict) and line.get("error"):
                raise docker.errors.DockerException(str(line["error"]))
        return str(daemon.quick.inspect_image(image)["Id"])
    except FAILURES as error:
        raise ImageError(
            f"the Dockerfile of {folder} builds on {image}, which is neither known to the Docker daemon at "
            f"{daemon.host.shown} nor to be pulled ({root_cause(error)!s:.300}); pull or load it there, or build on "
            f"{BASE_IMAGE}"
        ) from error


@contextlib.contextmanager
def _lock_of(what: str, tag: str, say: Report) -> Iterator[None]:
    """Held by one thread of one process of this machine. The file stays: one that is removed can be locked twice."""
    folder = Path(tempfile.gettempdir()) / f"agentgym-{os.geteuid()}-builds"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UnavailableError(f"the folder of build locks {folder} is not this user's alone (mode 0700); remove it")
    file = folder / hashlib.sha256(what.encode()).hexdigest()[:32]
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds {tag}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _silent(_: str) -> None:
    pass
