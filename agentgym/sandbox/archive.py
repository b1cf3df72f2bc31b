"""Files and folders on their way into a box or out of it. Law: an archive that exists is harmless: its paths are
relative and stay below where it is put, it holds no link and no device, and it is no larger than was allowed. What a
box packed is read as hostile bytes, whoever packed it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentgym.errors import ArchiveError, InputError
from agentgym.sandbox.inside.worker_tar import END, FILE, FOLDER, KINDS, BadTar, Entry, Reader, padded
from agentgym.sandbox.inside.worker_tree import Blocked, place_file, place_folder


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """How much an archive may be. Example: `ArchiveLimits(entries=100, bytes=2**20)`."""

    entries: int = 10_000  # files and folders
    bytes: int = 256 * 2**20  # of all files together
    depth: int = 32  # names in a path
    path_bytes: int = 1024


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """One file. Example: `ArchivedFile(b"echo hi\\n", executable=True)`."""

    data: bytes
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Archive:
    """Files by their path, and folders, among them all that files lie in.

    Example: `Archive.of({"out/answer.txt": "42"})` has the file "out/answer.txt" and the folder "out".
    """

    files: Mapping[str, ArchivedFile]
    folders: frozenset[str]

    @classmethod
    def of(
        cls, files: Mapping[str, bytes | str], *, executable: Iterable[str] = (), limits: ArchiveLimits | None = None
    ) -> Archive:
        """An archive of contents; text becomes UTF-8."""
        runs = set(executable)
        if not runs <= set(files):
            raise InputError(f"executable names files that are not in the archive: {sorted(runs - set(files))}")
        builder = _Builder(limits or ArchiveLimits())
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else bytes(content)
            builder.file(path, len(data)).append(ArchivedFile(data, path in runs))
        return builder.archive()

    @classmethod
    def from_folder(cls, folder: Path, limits: ArchiveLimits | None = None) -> Archive:
        """What lies in a folder of this machine; a link or anything else that is no file is refused."""
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        builder = _Builder(limits or ArchiveLimits())
        _read_folder(folder, "", builder)
        return builder.archive()

    @classmethod
    def from_tar(cls, tar: bytes | Iterable[bytes], limits: ArchiveLimits | None = None) -> Archive:
        """Reads a tar that nobody vouches for, as bytes or piece by piece; ArchiveError names the first entry that is
        not taken, before any of its bytes is kept."""
        pieces = iter([tar] if isinstance(tar, bytes) else tar)
        reader = Reader(lambda: next((piece for piece in pieces if piece), b""))
        builder = _Builder(limits or ArchiveLimits())
        try:
            for entry in iter(reader.next, None):
                path = _path_of(entry)
                if entry.kind == FOLDER:
                    if path:
                        builder.folder(path)
                elif entry.kind == FILE:
                    place = builder.file(path, entry.size)
                    place.append(ArchivedFile(b"".join(reader.data()), bool(entry.mode & 0o100)))
                else:
                    what = KINDS.get(entry.kind, f"of the unknown kind {entry.kind!r}")
                    raise ArchiveError(f"the archive's entry {path!r:.300} is {what}; only files and folders are taken")
        except BadTar as error:
            raise ArchiveError(f"the archive is not taken: {error}") from None
        return builder.archive()

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(len(file.data) for file in self.files.values())

    def __contains__(self, path: object) -> bool:
        return path in self.files or path in self.folders

    def read(self, path: str) -> bytes:
        """The content of one file; ArchiveError if it is not there."""
        if path not in self.files:
            raise ArchiveError(f"the archive holds no file {path!r:.300}")
        return self.files[path].data

    def to_tar(self) -> bytes:
        """The same tar for the same archive, byte by byte."""
        return b"".join(self._tar())

    def _tar(self) -> Iterator[bytes]:
        for folder in sorted(self.folders):
            yield Entry(folder.encode(), FOLDER, mode=0o755).header()
        for path, file in sorted(self.files.items()):
            yield Entry(path.encode(), FILE, len(file.data), _mode(file)).header()
            yield padded(file.data)
        yield END

    def write_to(self, folder: Path) -> None:
        """Writes it below `folder`, which is made if it is not there. A link that lies there is never followed: where a
        file goes it is replaced, where a folder should be it is an ArchiveError."""
        folder.mkdir(parents=True, exist_ok=True)
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in sorted(self.folders):
                place_folder(root, path.split("/"))
            for path, file in sorted(self.files.items()):
                place_file(root, path.split("/"), (file.data,), _mode(file))
        except Blocked as error:
            raise ArchiveError(f"the archive cannot be written to {folder}: {error}") from None
        finally:
            os.close(root)


class _Builder:
    """What was taken so far, and whether the next entry may join it."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._files: dict[str, list[ArchivedFile]] = {}
        self._folders: set[str] = set()
        self._bytes = 0

    def file(self, path: str, size: int) -> list[ArchivedFile]:
        """Where the file goes, if it may."""
        self._check(path)
        if path in self._files:
            raise ArchiveError(f"the archive holds {path!r:.300} twice")
        if path in self._folders:
            raise ArchiveError(f"the archive holds {path!r:.300} as a folder and as a file")
        self._bytes += size
        if self._bytes > self._limits.bytes:
            raise ArchiveError(
                f"the archive holds more than {self._limits.bytes} bytes: {path!r:.300} has {size}, which is too much"
            )
        self._parents(path)
        place = self._files[path] = []
        self._count(path)
        return place

    def folder(self, path: str) -> None:
        self._check(path)
        self._parents(path + "/")

    def archive(self) -> Archive:
        return Archive({path: place[0] for path, place in self._files.items()}, frozenset(self._folders))

    def _check(self, path: str) -> None:
        parts = path.split("/")
        limits = self._limits
        if path.startswith("/"):
            raise ArchiveError(f"the archive's entry {path!r:.300} is an absolute path")
        if ".." in parts:
            raise ArchiveError(f"the archive's entry {path!r:.300} holds '..'")
        if "" in parts or "." in parts or "\0" in path:
            raise ArchiveError(f"the archive's entry {path!r:.300} is no path")
        try:
            encoded = path.encode()
        except UnicodeEncodeError:
            raise ArchiveError(f"the archive's entry {path!r:.300} is no UTF-8") from None
        if len(encoded) > limits.path_bytes or len(parts) > limits.depth or max(map(len, encoded.split(b"/"))) > 255:
            raise ArchiveError(
                f"the archive's entry {path!r:.300} has a path of {len(encoded)} bytes and {len(parts)} names; "
                f"{limits.path_bytes} and {limits.depth} are allowed, and 255 bytes for a name"
            )

    def _parents(self, path: str) -> None:
        """The folders on the way to `path`."""
        end = path.find("/")
        while end >= 0:
            parent = path[:end]
            if parent in self._files:
                raise ArchiveError(f"the archive holds {parent!r:.300} as a file and as a folder")
            if parent not in self._folders:
                self._folders.add(parent)
                self._count(parent)
            end = path.find("/", end + 1)

    def _count(self, path: str) -> None:
        if len(self._files) + len(self._folders) > self._limits.entries:
            raise ArchiveError(f"the archive holds more than {self._limits.entries} entries, the last is {path!r:.300}")


def _mode(file: ArchivedFile) -> int:
    return 0o755 if file.executable else 0o644


def _path_of(entry: Entry) -> str:
    """The entry's path as text, without the "./" and the "/" at the end that tar programs like to add; "" is the folder
    that all of it lies in."""
    try:
        path = entry.name.decode("utf-8")
    except UnicodeDecodeError:
        raise ArchiveError(f"the archive's entry {entry.name!r:.300} is no UTF-8") from None
    path = path[2:] if path.startswith("./") else path
    if entry.kind == FOLDER:
        path = path[:-1] if path.endswith("/") else path
        return "" if path == "." else path
    return path


def _read_folder(folder: Path, above: str, builder: _Builder) -> None:
    with os.scandir(folder) as found:
        for each in sorted(found, key=lambda entry: entry.name):
            path = above + each.name
            mode = each.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                builder.folder(path)
                _read_folder(Path(each.path), path + "/", builder)
            elif stat.S_ISREG(mode):
                place = builder.file(path, each.stat(follow_symlinks=False).st_size)
                place.append(ArchivedFile(Path(each.path).read_bytes(), bool(mode & 0o100)))
            else:
                what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise ArchiveError(f"{each.path} is {what}; only files and folders are taken")
