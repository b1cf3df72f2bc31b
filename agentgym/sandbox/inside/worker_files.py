"""The files of a box: one by one, and whole trees as tar. Law as in worker.py; nothing here is ever held in memory as a
whole, for what lies in the box's folders counts against the same limit as the worker."""

import errno
import posix
from _stat import S_ISDIR, S_ISFIFO, S_ISLNK, S_ISREG

from agentgym.sandbox.inside.worker_frames import PART
from agentgym.sandbox.inside.worker_line import Refused
from agentgym.sandbox.inside.worker_tar import END, FIFO, FILE, FOLDER, HARD_LINK, LINK, BadTar, Entry, Reader
from agentgym.sandbox.inside.worker_tree import READ_FOLDER, Blocked, open_folder, place_file, place_folder, vacate

MAX_DEPTH = 100
READ_FILE = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC


class Files:
    def __init__(self, line, settings, processes):
        self.line, self.processes = line, processes
        self.file_limit = settings["file_limit"]

    def do_read(self, request, _):
        fd = posix.open(request["path"], posix.O_RDONLY | posix.O_NONBLOCK | posix.O_CLOEXEC)
        try:
            if not S_ISREG(posix.fstat(fd).st_mode):
                raise Refused("failed", f"{request['path']!r} is not a regular file")
            size = 0
            for chunk in iter(lambda: posix.read(fd, PART), b""):
                size += len(chunk)
                if size > self.file_limit:
                    raise Refused("limit", f"{request['path']!r} is larger than {self.file_limit} bytes")
                self.line.part(request["id"], chunk)
        finally:
            posix.close(fd)
        return {}, b""

    def do_write(self, request, body):
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_NONBLOCK | posix.O_CLOEXEC
        try:
            fd = posix.open(request["path"], flags, 0o644)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a pipe or a socket that nobody reads
                raise Refused("failed", f"{request['path']!r} is not a regular file") from None
            raise
        try:
            if not S_ISREG(posix.fstat(fd).st_mode):
                raise Refused("failed", f"{request['path']!r} is not a regular file")
            posix.ftruncate(fd, 0)
            for chunk in iter(body.chunk, b""):
                view = memoryview(chunk)
                while view:
                    view = view[posix.write(fd, view) :]
        finally:
            posix.close(fd)
        return {}, b""

    def do_put(self, request, body):
        """Files and folders of a tar, below a directory."""
        make_path(request["path"])
        root = posix.open(request["path"], posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        try:
            reader = Reader(body.chunk)
            for entry in iter(reader.next, None):
                parts = parts_of(entry.name)
                if entry.kind == FOLDER:
                    place_folder(root, parts)
                else:
                    place_file(root, parts, reader.data(), entry.mode)
        except (BadTar, Blocked) as error:
            raise Refused("archive", str(error)) from None
        finally:
            posix.close(root)
        return {}, b""

    def do_export(self, request, _):
        """Paths as a tar, taken at one moment. `exact`: with links, pipes, modes and times, for `do_restore`."""
        was_frozen = self.processes.frozen is not None
        self.processes.stop_all()
        try:
            pack = Pack(lambda data: self.line.part(request["id"], data), request["exact"], request["limit"])
            for path in request["paths"]:
                pack.add(parts_of(path.encode()))
            pack.flush(END)
        except Blocked as error:
            raise Refused("archive", str(error)) from None
        finally:
            if not was_frozen:
                self.processes.go_on()
        return {}, b""

    def do_restore(self, request, body):
        """What `do_export` packed in another box, where it was."""
        root = posix.open("/", READ_FOLDER)
        kept = []
        try:
            reader = Reader(body.chunk)
            for entry in iter(reader.next, None):
                restore(root, entry, reader)
                if entry.kind in (FILE, FOLDER, FIFO):
                    kept.append(entry)
        except (BadTar, Blocked) as error:
            raise Refused("archive", str(error)) from None
        finally:
            posix.close(root)
        for entry in kept:  # at the end: what is written into a folder changes its time
            path = b"/" + entry.name
            try:
                posix.chmod(path, entry.mode)
                posix.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
            except PermissionError:
                pass  # a folder that the box was given, and that is not its own
        return {}, b""


def restore(root, entry, reader):
    parts = parts_of(entry.name)
    if entry.kind == FOLDER:
        place_folder(root, parts)
    elif entry.kind == FILE:
        place_file(root, parts, reader.data(), entry.mode | 0o200)
    else:
        parent = open_folder(root, parts[:-1], make=True)
        try:
            vacate(parent, parts)
            if entry.kind == LINK:
                posix.symlink(entry.link, parts[-1], dir_fd=parent)
                times = (entry.mtime_ns, entry.mtime_ns)
                posix.utime(parts[-1], ns=times, dir_fd=parent, follow_symlinks=False)
            elif entry.kind == HARD_LINK:
                posix.link(b"/" + entry.link, parts[-1], dst_dir_fd=parent, follow_symlinks=False)
            else:
                posix.mkfifo(parts[-1], entry.mode, dir_fd=parent)
        finally:
            posix.close(parent)


class Pack:
    """A tar that is sent while it is written."""

    def __init__(self, send, exact, limit):
        self.send, self.exact, self.left = send, exact, limit
        self.buffer = bytearray()
        self.seen = {}  # (device, inode) of files with several names -> the first of them

    def flush(self, data=b""):
        self.buffer += data
        if self.buffer:
            self.send(bytes(self.buffer))
            self.buffer.clear()

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise Refused("limit", "what was asked for is more than one call may take out of a box")
        self.buffer += data
        if len(self.buffer) >= PART:
            self.flush()

    def add(self, parts):
        root = posix.open("/", READ_FOLDER)
        try:
            parent = open_folder(root, parts[:-1])
        finally:
            posix.close(root)
        try:
            self.visit(parent, parts[-1], "/".join(parts), 0)
        finally:
            posix.close(parent)

    def visit(self, parent, base, name, depth):
        try:
            info = posix.stat(base, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/" + name) from None
        encoded = name.encode("utf-8", "surrogateescape")
        mtime_ns = info.st_mtime_ns if self.exact else 0
        entry = Entry(encoded, FILE, 0, info.st_mode, b"", mtime_ns)
        if S_ISDIR(info.st_mode):
            entry.kind = FOLDER
            self.write(entry.header())
            self.visit_folder(parent, base, name, depth)
        elif S_ISREG(info.st_mode):
            first = self.seen.setdefault((info.st_dev, info.st_ino), encoded) if info.st_nlink > 1 else encoded
            if self.exact and first != encoded:
                entry.kind, entry.link = HARD_LINK, first
                self.write(entry.header())
            else:
                self.copy(parent, base, name, entry)
        elif not self.exact:
            what = "a symbolic link" if S_ISLNK(info.st_mode) else "neither a file nor a folder"
            raise Refused("archive", f"'/{name}' is {what}, and only files and folders are exported")
        elif S_ISLNK(info.st_mode):
            entry.kind, entry.link = LINK, posix.readlink(base.encode("utf-8", "surrogateescape"), dir_fd=parent)
            self.write(entry.header())
        elif S_ISFIFO(info.st_mode):
            entry.kind = FIFO
            self.write(entry.header())
        # a socket without its process is nothing

    def visit_folder(self, parent, base, name, depth):
        if depth == MAX_DEPTH:
            raise Refused("archive", f"'/{name[:200]}' lies more than {MAX_DEPTH} folders deep")
        folder = self.opened(parent, base, name, READ_FOLDER)
        try:
            with posix.scandir(folder) as found:
                for each in found:
                    self.visit(folder, each.name, f"{name}/{each.name}", depth + 1)
        finally:
            posix.close(folder)

    def copy(self, parent, base, name, entry):
        fd = self.opened(parent, base, name, READ_FILE)
        try:
            entry.size = left = posix.fstat(fd).st_size
            self.write(entry.header())
            while left:
                data = posix.read(fd, min(left, PART))
                if not data:
                    raise Refused("failed", f"'/{name}' became shorter while it was read")
                self.write(data)
                left -= len(data)
            self.write(bytes(-entry.size % 512))
        finally:
            posix.close(fd)

    def opened(self, parent, base, name, flags):
        try:
            return posix.open(base, flags, dir_fd=parent)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "/" + name) from None


def parts_of(name):
    """The names on the way to an entry."""
    return [part for part in name.decode("utf-8", "surrogateescape").split("/") if part not in ("", ".")]


def make_path(path):
    """Makes a directory and those above it; what is there already, links included, is as the caller named it."""
    made = "/" if path.startswith("/") else ""
    for part in path.split("/"):
        if part:
            made += part
            try:
                posix.mkdir(made, 0o755)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
            made += "/"
