"""Writing below one folder and reading below it, never through a link. Law: names are walked one by one from an open
folder, and each must be the folder itself, so that a link that is there already, or appears meanwhile, leads nowhere.
Standard library only, C modules only: this source is sent into the box; on the host, Archive writes with it."""

import errno
import posix

READ_FOLDER = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_NOFOLLOW | posix.O_CLOEXEC
CREATE = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC


class Blocked(Exception):
    """A path that cannot be walked, because a link or a file stands in its way."""

    def __init__(self, name, why):
        super().__init__(f"{name!r} {why}")


def open_folder(root_fd, parts, make=False):
    """A descriptor of the folder `parts` below root_fd; with `make`, folders that are not there are made."""
    fd = posix.dup(root_fd)
    posix.set_inheritable(fd, False)
    for index, part in enumerate(parts):
        try:
            if make:
                make_folder(fd, part)
            inner = enter(fd, part)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Blocked("/".join(parts[: index + 1]), "is a link or a file, where a folder should be") from None
            raise
        finally:
            posix.close(fd)
        fd = inner
    return fd


def enter(fd, part):
    """Opens the folder `part` of an open folder. gVisor follows a link there in spite of O_NOFOLLOW, so what was opened
    must be what has the name."""
    inner = posix.open(part, READ_FOLDER, dir_fd=fd)
    named, opened = posix.stat(part, dir_fd=fd, follow_symlinks=False), posix.fstat(inner)
    if (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
        posix.close(inner)
        raise OSError(errno.ELOOP, posix.strerror(errno.ELOOP), part)
    return inner


def make_folder(fd, part):
    try:
        posix.mkdir(part, 0o755, dir_fd=fd)
    except FileExistsError:
        return


def place_file(root_fd, parts, chunks, mode):
    """Writes a file in the place of what has its name; a link with that name is replaced and not followed."""
    parent = open_folder(root_fd, parts[:-1], make=True)
    try:
        vacate(parent, parts)
        fd = posix.open(parts[-1], CREATE, mode, dir_fd=parent)
    finally:
        posix.close(parent)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[posix.write(fd, view) :]
        posix.fchmod(fd, mode)
    finally:
        posix.close(fd)


def vacate(parent, parts):
    try:
        posix.unlink(parts[-1], dir_fd=parent)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        raise Blocked("/".join(parts), "is a folder, and cannot be replaced by a file") from None


def place_folder(root_fd, parts):
    posix.close(open_folder(root_fd, parts, make=True))
