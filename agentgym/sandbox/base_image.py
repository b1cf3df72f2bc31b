"""The base image of the Docker tier, built without a registry. Law: the tag appears when all of the image is there, and
nothing of the build stays on the machine, whatever happened.

`python -m agentgym.sandbox.base_image` installs a small Debian with debootstrap from a package mirror into a temporary
folder and hands it to the Docker daemon as a tar stream.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from agentgym.errors import AgentGymError, InputError, SandboxError, UnavailableError
from agentgym.sandbox.spec import BASE_IMAGE, BOX_UID

SUITE = "bookworm"
PACKAGES = ("python3", "ca-certificates")  # python3-minimal lacks most of the standard library
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64", "amd64": "amd64"}
STEPS = 400  # about as many lines as debootstrap says; only the bar depends on it
LEFT_OUT = (
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./tmp/*",
    "./debootstrap",
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./var/log/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/info/*",
    "./usr/share/locale/*",
)
Report = Callable[[str], None]


def build_base_image(
    tag: str = BASE_IMAGE, *, force: bool = False, mirror: str | None = None, report: Report = print
) -> bool:
    """Builds the image unless the daemon has it; whether it was built. About a minute, and 300 MB of temporary disk."""
    from agentgym.sandbox.docker.images import daemon_architecture, has_image, import_image

    if not re.fullmatch(r"[a-z0-9][a-z0-9._/-]*:[\w][\w.-]{0,127}", tag):
        raise InputError(f"the tag of the base image must look like name:version, got {tag!r}")
    if has_image(tag) and not force:
        report(f"{tag} exists already (--force builds it again)")
        return False
    architecture = _architecture(daemon_architecture())
    program = _debootstrap()
    source = mirror or _mirror_of_this_machine()
    with _temporary_root() as root:
        report(f"installing Debian {SUITE} ({architecture}) with {', '.join(PACKAGES)} from {source or 'its mirror'}")
        command = [program, f"--arch={architecture}", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        _run([*command, SUITE, str(root), *([source] if source else [])], report)
        _finish(root)
        report(f"handing the image to Docker as {tag}")
        labels = {"agentgym.base": SUITE, "agentgym.architecture": architecture}
        import_image(_tar(root), tag, labels)
    report(f"built {tag}")
    return True


def _architecture(daemon: str) -> str:
    own = ARCHITECTURES.get(platform.machine())
    if own is None:
        raise UnavailableError(f"the base image is built for amd64 and arm64; this machine is {platform.machine()}")
    if daemon and daemon != own:
        raise UnavailableError(
            f"the Docker daemon runs on {daemon} and this machine is {own}; build the base image on a machine like it"
        )
    return own


def _debootstrap() -> str:
    if sys.platform != "linux":
        raise UnavailableError(
            "the base image is built with debootstrap, which needs Linux; build it in a virtual machine"
        )
    if os.geteuid() != 0:
        raise UnavailableError("debootstrap needs root; run this command with sudo")
    program = shutil.which("debootstrap")
    if program is None:
        raise UnavailableError("debootstrap is not on this machine; install it (apt-get install debootstrap)")
    return program


def _mirror_of_this_machine() -> str | None:
    """The mirror that apt uses for this suite here, if it does; debootstrap knows a default otherwise."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():  # deb [options] URI suite component...
            found = re.match(rf"deb\s+(?:\[[^]]*\]\s+)?(https?://\S+)\s+{SUITE}\s+main\b", line.strip())
            if found:
                return found[1]
        for block in re.split(r"\n\s*\n", text):  # deb822
            fields = dict(re.findall(r"(?m)^(URIs|Suites|Components|Enabled):\s*(.+)$", block))
            if SUITE in fields.get("Suites", "").split() and "main" in fields.get("Components", "").split():
                addresses = [part for part in fields.get("URIs", "").split() if part.startswith("http")]
                if addresses and fields.get("Enabled", "yes").strip() != "no":
                    return addresses[0]
    return None


@contextlib.contextmanager
def _temporary_root() -> Iterator[Path]:
    """A folder that is gone afterwards, with what debootstrap may have left mounted in it."""
    folder = Path(tempfile.mkdtemp(prefix="agentgym-base-"))
    root = folder / "root"
    root.mkdir(mode=0o755)
    try:
        yield root
    finally:
        for mounted in ("proc", "sys", "dev/pts", "dev"):
            if os.path.ismount(root / mounted):
                subprocess.run(["umount", "-l", str(root / mounted)], check=False)
        shutil.rmtree(folder)


def _run(command: list[str], report: Report) -> None:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    last: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last = [*last[-7:], line.strip()]
            report(line.strip())
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if code:
        raise SandboxError(f"debootstrap failed with code {code}: {' | '.join(last)}")


def _finish(root: Path) -> None:
    """What a box needs besides the packages: a name for its uid, and the folders that get writable mounts."""
    with (root / "etc/passwd").open("a") as passwd:
        passwd.write(f"agent:x:{BOX_UID}:{BOX_UID}::/work:/bin/sh\n")
    with (root / "etc/group").open("a") as group:
        group.write(f"agent:x:{BOX_UID}:\n")
    (root / "work").mkdir()
    (root / "work").chmod(0o755)


def _tar(root: Path) -> Iterator[bytes]:
    """The folder as a tar stream; raises at the end if tar failed, so that a part of it never becomes an image."""
    exclude = [f"--exclude={pattern}" for pattern in LEFT_OUT]
    command = ["tar", "-C", str(root), "--numeric-owner", "--sort=name", *exclude, "-c", "."]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        while chunk := process.stdout.read(1 << 20):
            yield chunk
        said = process.stderr.read().decode(errors="replace")
        if process.wait():
            raise SandboxError(f"tar of the base image failed: {said.strip():.500}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m agentgym.sandbox.base_image", description=__doc__)
    parser.add_argument("--tag", default=BASE_IMAGE, help="name of the image (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="build it even if it exists")
    parser.add_argument("--mirror", help="Debian mirror (default: the one apt uses here, else debootstrap's)")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("looking for the image", total=STEPS)

            def report(text: str) -> None:
                progress.update(task, description=text[:70].replace("[", r"\["), advance=1)
                if not text.startswith(("I: ", "W: ")):
                    progress.console.print(text, markup=False, soft_wrap=True)

            build_base_image(options.tag, force=options.force, mirror=options.mirror, report=report)
    except AgentGymError as error:
        console.print(f"error: {error}", markup=False, style="red")
        return error.exit_code
    except KeyboardInterrupt:
        console.print("interrupted; nothing was left behind", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
