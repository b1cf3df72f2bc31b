"""The base image's builder, with a debootstrap of a few files in place of the real one, and the real one if asked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentgym.errors import InputError, SandboxError, UnavailableError
from agentgym.sandbox import BASE_IMAGE, SandboxSpec, base_image, open_sandbox
from agentgym.sandbox.docker.images import has_image

pytestmark = pytest.mark.docker
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap needs root")

TINY = """#!/bin/sh
for root; do case $root in /*) break;; esac; done
mkdir -p $root/etc $root/usr/share/doc/x $root/usr/bin $root/proc $root/dev $root/tmp
echo 'root:x:0:0::/root:/bin/sh' > $root/etc/passwd; echo 'root:x:0:' > $root/etc/group
echo doc > $root/usr/share/doc/x/y; echo "$@" > $root/etc/arguments
echo 'I: Retrieving nothing'
"""
FAILING = "#!/bin/sh\necho 'E: Failed getting release file' >&2; exit 1\n"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def use_debootstrap(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "debootstrap"
    program.parent.mkdir()
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def tag() -> Iterator[str]:
    import docker

    name = f"agentgym/test-base:{os.getpid()}"
    yield name
    client = docker.from_env()
    if has_image(name):
        client.api.remove_image(name, force=True)
    client.close()


def test_an_image_that_exists_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    assert base_image.build_base_image(report=said.append) is False
    assert said == [f"{BASE_IMAGE} exists already (--force builds it again)"]
    assert base_image.main([]) == 0


@needs_root
def test_a_build_makes_the_tag_and_leaves_no_files(
    tag: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import docker

    use_debootstrap(TINY, tmp_path, monkeypatch)
    said: list[str] = []
    assert base_image.build_base_image(tag, mirror="http://mirror.example/debian", report=said.append) is True
    assert said[-1] == f"built {tag}"
    assert "I: Retrieving nothing" in said
    assert list(scratch.iterdir()) == []
    client = docker.from_env()
    config = client.api.inspect_image(tag)["Config"]
    first = client.api.inspect_image(tag)["Id"]
    assert config["Labels"]["agentgym.base"] == "bookworm"
    assert base_image.build_base_image(tag, force=True, report=said.append) is True
    left = [image["Id"] for image in client.api.images()]
    client.close()
    assert first not in left, "a rebuilt image must not stay behind without a name"


@needs_root
def test_a_failed_build_is_typed_and_leaves_nothing(
    tag: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_debootstrap(FAILING, tmp_path, monkeypatch)
    with pytest.raises(SandboxError, match="E: Failed getting release file"):
        base_image.build_base_image(tag, report=lambda _: None)
    assert base_image.main(["--tag", tag]) == 1
    assert "Failed getting release file" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []
    assert not has_image(tag)


@needs_root
def test_missing_debootstrap_and_bad_tags_name_the_mend(monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnavailableError, match="apt-get install debootstrap"):
        base_image.build_base_image(tag)
    for bad in ("no-version", "Upper:1", "a b:1", ":1", "x:"):
        with pytest.raises(InputError, match="name:version"):
            base_image.build_base_image(bad)
    assert base_image.main(["--tag", "no-version"]) == 2


def test_not_being_root_names_the_mend(monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableError, match="sudo"):
        base_image.build_base_image(tag)


def test_the_base_image_can_do_ordinary_mathematics() -> None:
    code = "import ast, decimal, fractions, itertools, json, math, random, statistics, sqlite3, ssl, zoneinfo"
    with open_sandbox("docker", SandboxSpec()) as box:
        assert box.exec(["python3", "-c", code]).exit_code == 0
        assert box.exec("whoami").stdout == b"agent\n"


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(1800)  # debootstrap starts thousands of processes
def test_the_real_build(tag: str) -> None:
    assert base_image.build_base_image(tag, report=lambda _: None) is True
    with open_sandbox("docker", SandboxSpec(image=tag)) as box:
        assert box.exec("python3 -c 'print(6 * 7)'").stdout == b"42\n"
