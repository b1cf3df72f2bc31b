"""Task images: one build for each content, however many ask; folders that are not taken; builds that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from agentgym.errors import ImageError, InputError, SandboxError, UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.docker import images
from agentgym.sandbox.docker.host import OWN_SOCKET, connect
from agentgym.sandbox.docker.image_context import bases_of, read_context
from agentgym.sandbox.docker.images import build_image, has_image, remove_image, task_images
from agentgym.sandbox.ownership.lease import owner

FROM = "FROM agentgym/base:bookworm\n"
BASES = {"agentgym/base:bookworm": "sha256:1"}


def a_folder(folder: Path, dockerfile: str = FROM, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def built() -> Iterator[list[str]]:
    """Tags to remove afterwards."""
    tags: list[str] = []
    yield tags
    for tag in tags:
        remove_image(tag)


# ------------------------------------------------------------------------------------------------------- the context


def test_the_name_is_the_content(tmp_path: Path) -> None:
    first = a_folder(tmp_path / "first", data="1")
    second = a_folder(tmp_path / "second", data="1")
    os.utime(second / "data", (1, 1))
    digest = read_context(first).digest(BASES)
    assert read_context(second).digest(BASES) == digest, "neither the folder's name nor times"
    changes = [
        lambda: (second / "data").write_text("2"),
        lambda: (second / "data").chmod(0o755),
        lambda: (second / "data").rename(second / "datum"),
        lambda: (second / "empty").mkdir(),
        lambda: (second / "Dockerfile").write_text(FROM + "ENV A=1\n"),
        lambda: (second / "link").symlink_to("datum"),
    ]
    seen = {digest}
    for change in changes:
        change()
        seen.add(read_context(second).digest(BASES))
    assert len(seen) == 1 + len(changes), "every change gives another name"
    assert read_context(first).digest({"agentgym/base:bookworm": "sha256:2"}) != digest, "and so does another base"


def test_the_tar_has_no_times_and_no_owners(tmp_path: Path) -> None:
    import io
    import tarfile

    folder = a_folder(tmp_path / "x", data="1")
    out = io.BytesIO()
    read_context(folder).write_tar(out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        assert [(entry.name, entry.mtime, entry.uid, entry.uname) for entry in tar] == [
            ("Dockerfile", 0, 0, ""),
            ("data", 0, 0, ""),
        ]


def test_what_is_ignored_is_neither_sent_nor_hashed(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "x", secret="s", kept="k", **{".dockerignore": "# why\nsecret\n*.log\n!keep.log\n"})
    (folder / "a.log").write_text("")
    (folder / "keep.log").write_text("")
    context = read_context(folder)
    assert set(context.paths) == {".dockerignore", "Dockerfile", "keep.log", "kept"}
    (folder / "secret").write_text("another")
    assert read_context(folder).digest({}) == context.digest({})


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "a/../../outside", ".."])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder = a_folder(tmp_path / "x")
    (folder / "link").symlink_to(target)
    with pytest.raises(ImageError, match=r"x/link is a link to .*leaves the folder"):
        read_context(folder).digest({})


def test_what_is_no_folder_with_a_dockerfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        build_image(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no Dockerfile"):
        build_image(tmp_path)
    (tmp_path / "Dockerfile").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"has no Dockerfile \(a file of its own, no link\)"):
        build_image(tmp_path)
    folder = a_folder(tmp_path / "x")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ImageError, match="neither a file, a folder nor a link"):
        read_context(folder).digest({})


@pytest.mark.parametrize(
    ("dockerfile", "bases"),
    [
        ("FROM a:1", ["a:1"]),
        ("# FROM x\nARG V=2\nfrom --platform=linux/arm64 a:$V as one\nFROM scratch\nCOPY --from=one / /\n", ["a:2"]),
        ("FROM a\nFROM ${B:-b:3} AS two\nCOPY --chown=1 --from=c/d:4 x y\nADD --from=0 x y", ["a", "b:3", "c/d:4"]),
        ("FROM \\\n  a:1 \\\n  AS x\nFROM x", ["a:1"]),
    ],
)
def test_the_images_that_a_dockerfile_builds_upon(dockerfile: str, bases: list[str]) -> None:
    assert bases_of(dockerfile) == bases


# --------------------------------------------------------------------------------------------------------- the building

CALLER = (
    "import sys; from agentgym.sandbox.docker.images import build_image; print(build_image(sys.argv[1], report=print))"
)


@pytest.mark.docker
def test_callers_at_once_build_once(tmp_path: Path, built: list[str]) -> None:
    folder = a_folder(tmp_path / "once", FROM + f"RUN echo {time.time_ns()} > /made\n", data="1")
    base = connect().quick.inspect_image("agentgym/base:bookworm")["Id"]
    tag = f"{images.REPOSITORY}:{read_context(folder).digest({'agentgym/base:bookworm': base})}"
    with images._lock_of(f"{connect().host.url or OWN_SOCKET} {tag}", tag, print):  # a fifth, until all four are there
        command = [sys.executable, "-u", "-c", CALLER, str(folder)]
        callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        first = [caller.stdout.readline() for caller in callers if caller.stdout]
    assert first == [f"waiting for another process that builds {tag}\n"] * 4
    said = [caller.stdout.read().splitlines() for caller in callers if caller.stdout]
    assert [caller.wait() for caller in callers] == [0] * 4
    tags = {lines[-1] for lines in said}
    built += tags
    assert tags == {tag}
    assert sum(any(line.startswith("building ") for line in lines) for lines in said) == 1, said
    assert sum(any("exists already" in line for line in lines) for lines in said) == 3, said


@pytest.mark.docker
def test_an_image_is_built_run_listed_and_removed(tmp_path: Path, built: list[str]) -> None:
    dockerfile = FROM + "COPY data /data\nRUN echo from the build > /made\nENV GREETING=hello\n"
    folder = a_folder(tmp_path / "maze", dockerfile, data=f"{time.time_ns()}")
    said: list[str] = []
    tag = build_image(folder, report=said.append)
    built.append(tag)
    assert any(line.startswith("Step 2/") for line in said), "the build's lines are passed on"
    assert tag.startswith("agentgym/task:")
    with open_sandbox("docker", SandboxSpec(image=tag)) as box:
        assert box.exec("cat /made; echo $GREETING").text == "from the build\nhello\n"
        with pytest.raises(SandboxError, match="cannot be removed"):
            remove_image(tag)
    listed = {image.tag: image for image in task_images()}
    assert listed[tag].folder == "maze"
    assert listed[tag].num_bytes > 2**20
    labels = connect().quick.inspect_image(tag)["Config"]["Labels"]
    assert labels["agentgym.image"] == "task"
    assert "agentgym.owner" not in labels, "it serves the next run, too"
    assert remove_image(tag)
    assert not remove_image(tag)
    assert tag not in {image.tag for image in task_images()}


@pytest.mark.docker
def test_an_image_for_this_process_alone_is_labelled_so(tmp_path: Path, built: list[str]) -> None:
    folder = a_folder(tmp_path / "x", data=f"{time.time_ns()}")
    tag = build_image(folder, shared=False)
    built.append(tag)
    assert tag.endswith(owner().owner_id), "nobody else's tag"
    shared = build_image(folder)
    built.append(shared)
    assert connect().quick.inspect_image(shared)["Config"]["Labels"].get("agentgym.owner") is None
    assert connect().quick.inspect_image(tag)["Config"]["Labels"]["agentgym.owner"] == owner().owner_id


@pytest.mark.docker
def test_a_build_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    lines = "; ".join(f"echo line {i}" for i in range(30))
    mark = f"no such thing as {os.getpid()}-{time.monotonic_ns()}"  # other runs do the same at the same daemon
    folder = a_folder(tmp_path / mark.replace(" ", "-"), FROM + f"RUN {lines}; echo {mark}; exit 7\n")
    with pytest.raises(ImageError) as caught:
        build_image(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "returned a non-zero code: 7" in message
    assert message.endswith(f"line 29\n{mark}")
    assert "line 0\n" not in message
    assert folder.name not in {image.folder for image in task_images()}
    client = docker.from_env()
    left = [each for each in client.api.containers(all=True) if mark in each["Command"]]
    client.close()
    assert left == [], "no container of the build stays"


@pytest.mark.docker
def test_a_disk_that_is_full_in_the_build_says_so(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "full", FROM + "RUN head -c 200000000 /dev/zero > /dev/shm/file\n")
    with pytest.raises(ImageError, match=r"(?s)full cannot be built.*No space left on device"):
        build_image(folder)


@pytest.mark.docker
@pytest.mark.parametrize(
    ("dockerfile", "why"),
    [
        (FROM + "RAN true\n", r"(?i)unknown instruction: RAN"),
        (FROM + "COPY absent /x\n", r"(?s)absent.*no such file|not found"),
        ("", r"(?i)cannot be empty|no build stage"),
    ],
)
def test_a_dockerfile_that_is_wrong_says_where(tmp_path: Path, dockerfile: str, why: str) -> None:
    with pytest.raises(ImageError, match=why) as caught:
        build_image(a_folder(tmp_path / "wrong", dockerfile))
    assert "wrong cannot be built" in str(caught.value)


@pytest.mark.docker
def test_a_base_that_is_not_there_is_named_with_its_mend(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"builds on another: the image agentgym/nope:1 .*base_image"):
        build_image(a_folder(tmp_path / "ours", "FROM agentgym/nope:1\n"))
    with pytest.raises(
        ImageError,
        match=r"builds on localhost:1/nope:2, which is neither .* pull or load it there, or build on agentgym",
    ):
        build_image(a_folder(tmp_path / "theirs", "FROM localhost:1/nope:2\n"))


@pytest.mark.docker
def test_a_build_that_takes_too_long_ends(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "slow", FROM + "RUN for i in $(seq 600); do echo $i; sleep 1; done\n")
    with pytest.raises(ImageError, match="it took too long"):
        build_image(folder, timeout_s=2)
    assert not has_image("slow")
