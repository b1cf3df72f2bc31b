"""Who holds which boxes, so that none outlives its owner. Law: an owner is one process. Its lease is a locked file that
no other process can hold; every box is written down there before it exists and struck out when it is gone; and whoever
reads it can tell a living owner from a dead one without believing a process id.

The lease of an owner is a folder of the runtime folder ($XDG_RUNTIME_DIR/agentgym, else /tmp/agentgym-<uid>):

    <owner>/lease          JSON: who it is; locked (flock) while it lives, its time of change is a heartbeat
    <owner>/boxes/<name>   JSON: what the box is; `<name>.begun` until it answered for the first time
    <owner>/daemons/<n>    JSON: a Docker daemon that it used
    <owner>/reaper         locked by its reaper

Two nets hold the boxes of an owner that ends without closing them: its reaper (`reaper.py`), a process of its own, and
the worker in each box, which ends when it hears nothing for `lease_s`; the keeper thread here is what it hears.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agentgym.errors import AgentGymError, UnavailableError
from agentgym.sandbox.ownership.reaper import is_locked, start_time
from agentgym.sandbox.spec import SandboxSpec

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
LAUNCHING_S = 0.02  # between two looks at what starts the reaper
DEFAULT_DAEMON = "unix:///var/run/docker.sock"
REAPER = Path(__file__).with_name("reaper.py")
REAPER_ENVIRONMENT = ("PATH", "HOME", "SSH_AUTH_SOCK")  # for a daemon behind ssh


@dataclass(slots=True)
class _Kept:
    renew: Callable[[], None]
    every_s: float
    due: float  # on the monotonic clock


class Owner:
    """This process, as the holder of its boxes. Got by `owner()`.

    Example: `name = owner().new_name("namespace", SandboxSpec())`, once the box answers
    `owner().keep(name, client.renew, spec.lease_s)`, when nothing of it is left `owner().forget(name)`.
    """

    def __init__(self, runtime: Path) -> None:
        self.pid = os.getpid()
        self.owner_id = f"{self.pid}-{secrets.token_hex(4)}"
        self.host = host_identity(runtime)
        self.folder = runtime / self.owner_id  # goes with the owner, whatever is in it
        self._descriptor = self._take_lease(runtime)
        self._is_over = False
        self._changed = threading.Condition()
        self._kept: dict[str, _Kept] = {}
        self._tiers: dict[str, str] = {}
        self._daemons: dict[tuple[str, str], str] = {}
        self._reaper_start: subprocess.Popen[bytes] | None = None
        self.ensure_reaper()
        threading.Thread(target=self._renew_for_ever, name="agentgym-leases", daemon=True).start()

    def new_name(self, tier: str, spec: SandboxSpec, daemon: str | None = None, tls: Path | None = None) -> str:
        """The name of a box that does not exist yet, written down. `daemon`: the URL of the Docker daemon that will
        hold it, with the folder of its TLS keys; None: the one that the environment names, or none is needed."""
        name = f"agentgym-{self.owner_id}{secrets.token_hex(3)}"
        used = None if tier == "namespace" else self._use_daemon(*((daemon, tls) if daemon else default_daemon()))
        record = {
            "tier": tier,
            "daemon": used,
            "image": spec.image if tier != "namespace" else "",
            "relaxed": spec.relaxations,
            "created": time.time(),
            "lease_s": spec.lease_s,
        }
        with self._changed:
            self._tiers[name] = tier
        (self.folder / "boxes" / f"{name}.begun").write_text(json.dumps(record))
        return name

    def labels(self, name: str, spec: SandboxSpec) -> dict[str, str]:
        """What a container of that name is labelled with."""
        return {
            "agentgym.box": name,
            "agentgym.tier": self._tiers.get(name, "docker"),
            **self.image_labels(),
            "agentgym.lease_s": f"{spec.lease_s:g}",
            "agentgym.relaxed": ",".join(spec.relaxations),
            "agentgym.created": str(int(time.time())),
        }

    def image_labels(self) -> dict[str, str]:
        """What an image (or a volume) is labelled with that is of use to this owner alone; it goes with the owner."""
        return {"agentgym.owner": self.owner_id, "agentgym.host": self.host}

    def keep(self, name: str, renew: Callable[[], None], lease_s: float) -> None:
        """From now on `renew` is called about every lease_s / 4, from a thread of ours. It must not wait for longer
        than a moment; one that raises is logged and not called again, and the box ends with its lease."""
        boxes = self.folder / "boxes"
        with contextlib.suppress(FileNotFoundError):
            os.rename(boxes / f"{name}.begun", boxes / name)
        with self._changed:
            self._kept[name] = _Kept(renew, lease_s / 4, time.monotonic() + lease_s / 4)
            self._changed.notify()

    def forget(self, name: str) -> None:
        """Nothing is left of the box. Idempotent."""
        with self._changed:
            self._kept.pop(name, None)
            self._tiers.pop(name, None)
        boxes = self.folder / "boxes"
        for record in (boxes / name, boxes / f"{name}.begun"):
            with contextlib.suppress(FileNotFoundError):
                record.unlink()

    def ensure_reaper(self) -> None:
        """Starts the reaper unless it runs: one that was started for nothing finds the lock taken and ends."""
        if self._reaper_start is not None:
            if self._reaper_start.poll() is None or is_locked(self.folder / "reaper"):
                return
            logger.warning("the reaper of the sandboxes of this process is gone; starting another")
        environment = {name: os.environ[name] for name in REAPER_ENVIRONMENT if name in os.environ}
        command = [sys.executable, "-I", "-S", str(REAPER), str(self.folder), str(self.pid), start_time(self.pid)]
        try:
            self._reaper_start = subprocess.Popen(  # it forks once more and leaves us: nobody's child, no zombie
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env=environment,
            )
        except OSError as error:
            raise UnavailableError(f"the reaper of sandboxes cannot be started: {error}") from error

    def let_go(self) -> None:
        """Holds the lease no longer. In a forked child, where the lock is the parent's alone."""
        self._is_over = True
        os.close(self._descriptor)

    def _use_daemon(self, url: str, tls: Path | None) -> str:
        """Writes the daemon down; its name in the lease."""
        daemon = (url, str(tls) if tls else "")
        with self._changed:
            if daemon not in self._daemons:
                name = str(len(self._daemons))
                record = json.dumps({"url": daemon[0], "tls": daemon[1]})
                _write_whole(self.folder / "daemons" / name, record)
                self._daemons[daemon] = name
            return self._daemons[daemon]

    def _take_lease(self, runtime: Path) -> int:
        """Makes the folder under another name first: one that is there and not locked is a dead owner's."""
        made = runtime / f".{self.owner_id}"
        made.mkdir(mode=0o700)
        for name in ("boxes", "daemons"):
            (made / name).mkdir(mode=0o700)
        descriptor = os.open(made / "lease", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        who = {"owner": self.owner_id, "pid": self.pid, "start_time": start_time(self.pid), "host": self.host}
        os.write(descriptor, json.dumps({**who, "created": time.time(), "program": sys.argv[:1]}).encode())
        made.rename(self.folder)
        return descriptor

    def _renew_for_ever(self) -> None:
        beat = time.monotonic() + HEARTBEAT_S
        while True:
            with self._changed:
                due = min([beat, *(kept.due for kept in self._kept.values())])
                if self._is_launching():
                    due = min(due, time.monotonic() + LAUNCHING_S)
                self._changed.wait(max(0.0, due - time.monotonic()))
                if self._is_over:
                    return
                now = time.monotonic()
                late = [(name, kept) for name, kept in self._kept.items() if kept.due <= now]
                for _, kept in late:
                    kept.due = now + kept.every_s
            for name, kept in late:
                self._renew(name, kept)
            if now >= beat:
                beat = now + HEARTBEAT_S
                self._beat()

    def _is_launching(self) -> bool:
        """Whether the reaper's first process is there; it ends when it has made the second, and is waited for by this.
        No renewal stands behind it: on a busy machine it may take seconds."""
        return self._reaper_start is not None and self._reaper_start.poll() is None

    def _renew(self, name: str, kept: _Kept) -> None:
        try:
            kept.renew()
        except (AgentGymError, OSError) as error:
            with self._changed:
                was_ours = self._kept.get(name) is kept and self._kept.pop(name) is kept
            if was_ours:
                logger.warning("the lease of sandbox %s is not renewed any more: %s", name, error)

    def _beat(self) -> None:
        try:
            os.utime(self._descriptor)
            self.ensure_reaper()
        except (AgentGymError, OSError) as error:
            logger.warning("the lease of this process in %s: %s", self.folder, error)


# ------------------------------------------------------------------------------------------------- this process's one

_owner: Owner | None = None
_making = threading.Lock()


def owner() -> Owner:
    """This process's owner, made at the first call; a forked child gets one of its own."""
    global _owner
    with _making:
        if _owner is None:
            _owner = Owner(runtime_folder())
        return _owner


def _forked() -> None:
    global _owner, _making
    inherited, _owner, _making = _owner, None, threading.Lock()
    if inherited is not None:
        inherited.let_go()


os.register_at_fork(after_in_child=_forked)


# ------------------------------------------------------------------------------------------------ where, and who else


def runtime_folder() -> Path:
    """Where the leases of this user are; made if needed. /tmp is everybody's, so UnavailableError if it is not ours."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(f"/tmp/agentgym-{os.geteuid()}")
    if given.startswith("/") and _is_private(Path(given)):
        folder = Path(given) / "agentgym"
    with contextlib.suppress(FileExistsError):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise
        except OSError as error:
            raise UnavailableError(f"the folder of sandbox leases {folder} cannot be made: {error.strerror}") from error
    if not _is_private(folder):
        raise UnavailableError(
            f"the folder of sandbox leases {folder} is not this user's alone (a folder of mode 0700); remove it, or "
            "set XDG_RUNTIME_DIR to a folder that is"
        )
    return folder


def host_identity(runtime: Path) -> str:
    """Whose leases can be read here: this boot of this machine, this pid namespace, this user's runtime folder. Two
    containers or two machines that share a daemon differ in it, so neither takes the other's boxes for abandoned."""
    parts = [str(os.geteuid())]
    for file in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            parts.append(Path(file).read_text().strip())
    place = runtime.stat()
    parts += [os.readlink("/proc/self/ns/pid"), f"{place.st_dev}:{place.st_ino}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def default_daemon() -> tuple[str, Path | None]:
    """(URL, folder of the TLS keys) of the Docker daemon that the environment names."""
    url = os.environ.get("DOCKER_HOST") or DEFAULT_DAEMON
    if not os.environ.get("DOCKER_TLS_VERIFY") and not os.environ.get("DOCKER_TLS"):
        return url, None
    return url, Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")


def _is_private(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _write_whole(file: Path, text: str) -> None:
    """Whoever reads it, reads all of it."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.rename(file)
