"""A folder with a Dockerfile as what the daemon builds from. Law: the same content gives the same bytes and the same
name, whenever, wherever and by whom it is read; and nothing from outside the folder gets in.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from agentgym.errors import ImageError, InputError

MAX_BYTES = 2**30
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Context:
    """What is sent to the daemon. Example: `Context(Path("tasks/maze/environment"), ("Dockerfile", "solve.py"))`."""

    folder: Path
    paths: tuple[str, ...]  # relative, sorted, what .dockerignore leaves

    @property
    def dockerfile(self) -> str:
        """The text of the Dockerfile."""
        return (self.folder / "Dockerfile").read_text("utf-8", "replace")

    def digest(self, bases: Mapping[str, str]) -> str:
        """The hash of names, modes, bytes and of the images that it builds upon ({name: id})."""
        total = hashlib.sha256()
        for name, image_id in sorted(bases.items()):
            total.update(f"base\0{name}\0{image_id}\0".encode())
        for entry, file in self._entries():
            content = hashlib.sha256(entry.linkname.encode("utf-8", "surrogateescape"))
            while file is not None and (chunk := file.read(CHUNK)):
                content.update(chunk)
            name = entry.name.encode("utf-8", "surrogateescape")
            total.update(name + b"\0" + entry.type + b"%o\0" % entry.mode + content.digest())
        return total.hexdigest()[:32]

    def write_tar(self, out: IO[bytes]) -> None:
        """The same tar for the same content: no times, no owners."""
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for entry, file in self._entries():
                tar.addfile(entry, file)

    def _entries(self) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
        size = 0
        for path in self.paths:
            place = self.folder / path
            found = place.lstat()
            entry = tarfile.TarInfo(path)
            entry.mode = stat.S_IMODE(found.st_mode) & 0o755
            if stat.S_ISLNK(found.st_mode):
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, os.readlink(place), 0o777
                _refuse_escape(self.folder, path, entry.linkname)
                yield entry, None
            elif stat.S_ISDIR(found.st_mode):
                entry.type = tarfile.DIRTYPE
                yield entry, None
            elif stat.S_ISREG(found.st_mode):
                entry.size = found.st_size
                size += entry.size
                if size > MAX_BYTES:
                    raise ImageError(
                        f"the folder {self.folder} holds more than {MAX_BYTES} bytes for its image; leave out what the "
                        "image does not need with a .dockerignore"
                    )
                descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with open(descriptor, "rb") as file:
                    yield entry, file
            else:
                raise ImageError(f"{place} is neither a file, a folder nor a link, and an image cannot hold it")


def read_context(folder: Path) -> Context:
    """The folder as it is now; InputError if it is none with a Dockerfile."""
    from docker.utils.build import exclude_paths  # the patterns of .dockerignore as the docker command reads them

    folder = folder.resolve()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; an image is built from a folder with a Dockerfile")
    dockerfile = folder / "Dockerfile"
    if dockerfile.is_symlink() or not dockerfile.is_file():
        raise InputError(f"{folder} has no Dockerfile (a file of its own, no link)")
    ignored = folder / ".dockerignore"
    patterns: list[str] = []
    if ignored.is_file() and not ignored.is_symlink():
        lines = [line.strip() for line in ignored.read_text("utf-8", "replace").splitlines()]
        patterns = [line for line in lines if line and not line.startswith("#")]
    kept = exclude_paths(str(folder), patterns, dockerfile="Dockerfile")
    return Context(folder, tuple(sorted(str(path) for path in kept)))


def bases_of(dockerfile: str) -> list[str]:
    """The images that a Dockerfile names in FROM and COPY --from; not "scratch", not its own stages."""
    text = re.sub(r"(?m)^\s*#.*\n?", "", dockerfile)
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    arguments: dict[str, str] = {}
    stages: set[str] = {"scratch"}
    found: dict[str, None] = {}
    for line in text.splitlines():
        words = line.split()
        keyword = words[0].upper() if words else ""
        if keyword == "ARG" and not found and len(words) > 1 and "=" in words[1]:
            name, _, value = words[1].partition("=")
            arguments[name] = value.strip("\"'")
        elif keyword == "FROM":
            rest = [word for word in words[1:] if not word.startswith("--")]
            if rest:
                name = _filled(rest[0], arguments)
                if name.lower() not in stages:
                    found[name] = None
            if len(rest) >= 3 and rest[1].upper() == "AS":
                stages.add(rest[2].lower())
        elif keyword in ("COPY", "ADD"):
            for word in words[1:]:
                source = word.removeprefix("--from=")
                if source != word and not source.isdigit() and source.lower() not in stages:
                    found[source] = None
    return list(found)


def _filled(text: str, arguments: Mapping[str, str]) -> str:
    """With the ARGs that stand before the first FROM put in."""

    def value(match: re.Match[str]) -> str:
        name, _, default = (match[1] or match[2]).partition(":-")
        return arguments.get(name, default)

    return re.sub(r"\$\{([^}]*)\}|\$(\w+)", value, text)


def _refuse_escape(folder: Path, path: str, target: str) -> None:
    inside = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if target.startswith("/") or inside == ".." or inside.startswith("../"):
        raise ImageError(
            f"{folder / path} is a link to {target!r}, which leaves the folder; the image cannot hold what is not in "
            "it (put the file itself there, or make the link in the Dockerfile)"
        )
