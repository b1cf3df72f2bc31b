"""Attacks on whoever takes files out of a box, and on the machine that they are written to. Law: what an export gives
is an archive that can be written below a folder without touching anything beside it, or an ArchiveError."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from agentgym.errors import ArchiveError, SandboxDiedError, SandboxError, SandboxLimitError
from agentgym.sandbox.archive import Archive
from agentgym.sandbox.spec import Sandbox
from agentgym.testing.sandbox_abuse.attack import Attack, Scene, attack, hostile, require

SECRET = "/etc/passwd"


def _exported(box: Sandbox, code: str, kinds: list[str]) -> Archive | None:
    """What comes of `code` in a fresh folder; a refusal is noted by its class."""
    box.exec("cd /; rm -rf /work/x; mkdir -p /work/x")
    hostile(box, "import os, socket\nos.chdir('/work/x')\n" + code)
    try:
        archive = box.export(["/work/x"])
    except (ArchiveError, SandboxLimitError) as error:
        kinds.append(type(error).__name__)
        return None
    except SandboxDiedError:
        raise
    except SandboxError as error:  # a folder that cannot be read
        kinds.append(type(error).__name__)
        return None
    _write_it_down(archive)
    return archive


def _write_it_down(archive: Archive) -> None:
    """Below a folder of this machine, which has a neighbour; nothing but regular files may appear, and only inside."""
    with tempfile.TemporaryDirectory() as root:
        neighbour, inside = Path(root, "neighbour"), Path(root, "inside")
        neighbour.write_text("untouched")
        archive.write_to(inside)
        for path in inside.rglob("*"):
            require(not path.is_symlink() and (path.is_dir() or path.is_file()), f"{path.name!r} is no file or folder")
        require(sorted(os.listdir(root)) == ["inside", "neighbour"], f"beside the folder lies {os.listdir(root)}")
        require(neighbour.read_text() == "untouched", "a file beside the folder was written")


@attack("exports symbolic links to the host's files, to /, to itself, to a link, and a folder reached through one")
def links_in_an_export(scene: Scene) -> str:
    box, kinds = scene.box(), list[str]()
    for code in (
        f"os.symlink('{SECRET}', 'answer')",
        "os.symlink('/', 'root')",
        "os.symlink('../../../../..', 'up')",
        "os.symlink('x', 'x')",
        "os.mkdir('a'); os.symlink('a', 'b'); open('a/f', 'w').close()",
        "os.symlink('/proc/self/environ', 'environment')",
    ):
        archive = _exported(box, code, kinds)
        if archive is not None:
            data = b"".join(file.data for file in archive.files.values())
            require(b"root:" not in data and not data, f"followed a link and read {data[:60]!r}")
    require(len(kinds) == 6, f"only {len(kinds)} of 6 were refused")
    return f"refused with {kinds[0]}; {scene.check_usable(box)}"


@attack("exports hard links, a file under two names, pipes, sockets and device files")
def special_files_in_an_export(scene: Scene) -> str:
    box, kinds = scene.box(), list[str]()
    linked = _exported(box, "open('one', 'w').write('data'); os.link('one', 'two')", kinds)
    if linked is not None:
        contents = {file.data for file in linked.files.values()}
        require(contents == {b"data"}, f"hard links became {contents!r}")
    for code in ("os.mkfifo('pipe')", "socket.socket(socket.AF_UNIX).bind('socket')"):
        refused = len(kinds)
        _exported(box, code, kinds)
        require(len(kinds) == refused + 1, f"{code} was exported")
    _exported(box, "try: os.mknod('null', 0o20666, os.makedev(1, 3))\nexcept OSError: pass", kinds)
    how = "copies" if linked is not None else "refused"
    return f"hard links: {how}; pipes and sockets: {kinds[-1]}; {scene.check_usable(box)}"


@attack("exports names with dots, newlines, escapes, invalid UTF-8, 255 bytes; folders 500 deep; too many, too large")
def hostile_names_and_sizes(scene: Scene) -> str:
    box, kinds = scene.box(tmpfs_mb=32), list[str]()
    for code in (
        r"for name in (b'..x', b'a\nb', b'-rf', b'\x1b[2J', b'a' * 255, b'C:'): open(name, 'w').close()",
        r"open(b'\xff\xfe', 'w').close()",
        "for _ in range(500): os.mkdir('d'); os.chdir('d')",
        "for i in range(10_100): open(str(i), 'w').close()",
        "for i in range(40): os.truncate(os.open(f'hole{i}', os.O_RDWR | os.O_CREAT), 32 * 2**20)",
        "open('private', 'w').close(); os.chmod('private', 0)",
    ):
        _exported(box, code, kinds)
    for path in ("/work/x/../../etc", "/proc/self", "/dev", "/proc/1/fd", "/work/absent"):
        try:
            _write_it_down(box.export([path]))
        except SandboxError:
            continue
        except ValueError:  # a path that no host should ask for
            continue
    return f"written below its folder or refused ({', '.join(sorted(set(kinds)))}); {scene.check_usable(box)}"


@attack("swaps files for links and folders while they are exported, from a process in the background")
def changes_under_an_export(scene: Scene) -> str:
    box = scene.box()
    swap = f"""
import os
os.makedirs("/work/x/d", exist_ok=True); open("/work/x/d/f", "w").write("mine")
if os.fork() == 0:
    os.setsid()
    os.chdir("/work/x")
    while True:
        for make in (lambda: os.symlink("{SECRET}", "n"), lambda: os.mkdir("n"), lambda: open("n", "w").close()):
            try: make(); os.rename("n", "f")
            except OSError: pass
            for path in ("n", "f"):
                try: os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
                except OSError: pass
        try: os.rename("d", "e"); os.symlink("/etc", "d"); os.unlink("d"); os.rename("e", "d")
        except OSError: pass
"""
    hostile(box, swap)
    taken = 0
    for _ in range(40):
        try:
            archive = box.export(["/work/x"])
        except SandboxDiedError:
            raise
        except SandboxError:
            continue
        taken += 1
        for path, file in archive.files.items():
            require(b"root:" not in file.data, f"{path} holds a file from outside the folder")
    box.freeze()
    for _ in range(2):
        try:
            box.export(["/work/x"])
        except ArchiveError:
            continue
        except SandboxDiedError:
            raise
        except SandboxError:
            continue
    box.thaw()
    return f"no byte from outside its folder, {taken} of 40 exports went through; {scene.check_usable(box)}"


ATTACKS: tuple[Attack, ...] = (
    links_in_an_export,
    special_files_in_an_export,
    hostile_names_and_sizes,
    changes_under_an_export,
)
