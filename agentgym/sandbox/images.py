"""The images that a daemon holds. Law: a tag appears when all of its image is there, and one content is built once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import docker.errors

from agentgym.errors import SandboxError
from agentgym.sandbox.docker_host import FAILURES, Daemon, DockerHost, connect
from agentgym.sandbox.spec import BASE_IMAGE

BUILD = "python -m agentgym.sandbox.base_image"


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
        raise SandboxError(f"the Docker daemon did not take the image {image}: {error}") from error
    if not daemon.has_image(image):
        raise SandboxError(f"the Docker daemon did not make the image {image}: {answer!s:.500}")
    if old:
        with contextlib.suppress(docker.errors.APIError):  # it has another name, or a box still runs on it
            client.remove_image(old)
