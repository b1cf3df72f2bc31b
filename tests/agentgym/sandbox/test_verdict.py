"""What a verdict may be, what is left out of artifacts, and what a judge may ask: the pure parts, by examples and by
chance."""

from __future__ import annotations

import io
import math
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ArchiveError, SandboxError
from agentgym.sandbox.archive import Archive
from agentgym.sandbox.grading.judge_dialogue import Budget, Subject, read_request
from agentgym.sandbox.grading.verdict import Rubric, Ungraded, read_json, read_number
from agentgym.sandbox.grading.verify import is_automatic, without_automatic
from agentgym.sandbox.spec import Sandbox, SandboxSpec

NEVER = SandboxSpec()
numbers = st.one_of(
    st.floats(), st.integers(), st.integers(10**400, 10**401), st.booleans(), st.none(), st.text(max_size=3)
)


# --------------------------------------------------------------------------------------------------- pure: verdicts


@given(st.dictionaries(st.sampled_from(["correct", "style", "x"]), numbers), st.floats(-2, 2))
def test_only_finite_numbers_in_range_become_a_score(components: dict[str, Any], weight: float) -> None:
    rubric = Rubric({"correct": (0.0, 1.0), "style": (-1.0, 1.0)}, {"style": weight})
    good = set(components) == {"correct", "style"} and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        for value, (low, high) in ((components[name], rubric.ranges[name]) for name in rubric.ranges)
    )

    if not good:
        with pytest.raises(Ungraded) as caught:
            rubric.score(components)
        assert caught.value.reason in ("malformed", "not_finite", "out_of_range")
        return
    score = rubric.score(components)
    assert score.valid
    assert math.isfinite(score.value)
    assert rubric.worst("why").value <= score.value, "nothing is worth less than what the worst gets"


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_what_a_verdict_file_holds_is_read_or_refused_by_name(data: bytes) -> None:
    rubric = Rubric({"reward": (0.0, 1.0)}, {})
    for read in (lambda: rubric.score(read_json(data)), lambda: rubric.score({"reward": read_number(data)})):
        try:
            score = read()
        except Ungraded:
            continue
        assert 0.0 <= score.value <= 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"reward": NaN}', "not_finite"),
        (b'{"reward": -Infinity}', "not_finite"),
        (b'{"reward": 1e999}', "not_finite"),
        (b'{"reward": 1' + b"0" * 400 + b"}", "out_of_range"),
        (b'{"reward": 0, "reward": 1}', "malformed"),
        (b'{"reward": true}', "malformed"),
        (b'{"reward": "1"}', "malformed"),
        (b'{"reward": 1, "more": 1}', "malformed"),
        (b"[" * 60_000, "malformed"),
        (b'{"reward": 1}' + b" " * 70_000, "malformed"),
        (b"1.0", "malformed"),
        (b"", "malformed"),
    ],
)
def test_verdicts_that_are_none(text: bytes, reason: str) -> None:
    with pytest.raises(Ungraded) as caught:
        Rubric({"reward": (0.0, 1.0)}, {}).score(read_json(text))

    assert caught.value.reason == reason


@pytest.mark.parametrize("text", [b"1_0", "\u0661".encode(), b"0x1", b"1 1", b"", b"1" * 70_000, b"one", b"\xff"])
def test_numbers_that_are_none(text: bytes) -> None:
    with pytest.raises(Ungraded):
        read_number(text)


def test_a_reward_text_is_a_number() -> None:
    assert [read_number(text) for text in (b"1", b" 0.5\n", b"-.5", b"1e-3")] == [1.0, 0.5, -0.5, 0.001]
    assert math.isnan(read_number(b"nan"))


# -------------------------------------------------------------------------------------- pure: what is picked up unasked

NAMES = st.sampled_from(
    ["conftest.py", "a.py", ".git", "hooks", "x.pth", "__pycache__", "setup.cfg", "src", ".bashrc", "m.pyc", "conftest"]
)
paths = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(paths, st.binary(max_size=3), max_size=8), st.lists(paths, max_size=3))
def test_nothing_that_is_picked_up_unasked_is_kept(files: dict[str, bytes], declared: list[str]) -> None:
    names = ("/work", *(f"/work/{path}" for path in declared))
    apart = {
        path: data for path, data in files.items() if not any(other.startswith(path + "/") for other in files)
    }  # a path cannot be a file and a folder
    archive = Archive.of({f"work/{path}": data for path, data in apart.items()})

    kept, left_out = without_automatic(archive, names)

    assert {f"/{path}" for path in kept.files} | set(left_out) >= {f"/{path}" for path in archive.files}
    assert not any(is_automatic(f"/{path}", names) for path in kept.files)
    assert all(kept.files[path] == archive.files[path] for path in kept.files)
    parents = {path[:i] for path in kept.files for i in range(len(path)) if path[i] == "/"}
    assert parents <= kept.folders, "a file whose folder was left out"
    assert not any(is_automatic(f"/{path}", names) for path in kept.folders - parents)


@pytest.mark.parametrize(
    ("path", "declared", "expected"),
    [
        ("/work/conftest.py", "/work", True),
        ("/work/conftest.py", "/work/conftest.py", False),
        ("/work/a/b/__pycache__/m.pyc", "/work/a", True),
        ("/work/.git/hooks/post-checkout", "/work", True),
        ("/work/.git/hooks/post-checkout", "/work/.git", False),
        ("/work/.git/.bashrc", "/work/.git", True),
        ("/work/my_conftest.py", "/work", False),
        ("/work", "/work", False),
    ],
)
def test_what_is_picked_up_unasked(path: str, declared: str, expected: bool) -> None:
    assert is_automatic(path, (declared,)) is expected


# --------------------------------------------------------------------------------------------------- pure: questions

requests = st.dictionaries(
    st.sampled_from(["do", "command", "path", "timeout_s", "cwd", "x"]),
    st.one_of(numbers, st.sampled_from(["run", "read", "write", "verdict", ""]), st.lists(numbers, max_size=2)),
)


@given(st.lists(requests, max_size=5))
def test_a_question_that_is_none_opens_no_box(asked: list[dict[str, Any]]) -> None:
    def open_box(spec: SandboxSpec) -> Sandbox:
        raise SandboxError("a box was opened")

    subject = Subject(NEVER, Archive.of({}), Budget(runs=3), open_box)
    for request in asked:
        valid = request.get("do") in ("read", "write") and isinstance(request.get("path"), str)
        valid = valid or request.get("do") == "run"
        with pytest.raises(Ungraded) as caught:
            subject.answer(request, b"")
        if caught.value.reason == "sandbox_failed":
            assert valid, request


@given(st.one_of(st.binary(max_size=80), requests.map(lambda request: repr(request).encode())))
def test_what_a_judges_pipe_holds_is_a_question_or_refused_by_name(data: bytes) -> None:
    try:
        request, body = read_request(data)
    except Ungraded:
        return
    assert isinstance(request, dict)
    assert data.endswith(body)


# ------------------------------------------------------------------------------------------- pure: hostile artifacts

hostile_names = st.lists(
    st.sampled_from(["work", "..", ".", "", "a", "b", "conftest.py", "\n", "x" * 300, "\udcff", "é"]), max_size=5
).map("/".join)
entries = st.tuples(hostile_names, st.sampled_from(b"0123456789gxLKS\0"), hostile_names, st.binary(max_size=600))


@given(st.lists(entries, max_size=5), st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=4))
def test_a_hostile_tar_is_refused_or_harmless(members: list[Any], changed: list[tuple[int, int]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, kind, target, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = bytes([kind]), target, len(data)
            tar.addfile(info, io.BytesIO(data))
    raw = bytearray(buffer.getvalue())
    for place, value in changed:
        raw[place % len(raw)] = value

    try:
        kept, left_out = without_automatic(Archive.from_tar(bytes(raw)), ("/work",))
    except ArchiveError:
        return
    assert not any("conftest.py" in path.split("/") for path in kept.files if path.startswith("work/")), left_out
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder, "inside")
        kept.write_to(inside)
        assert os.listdir(folder) == ["inside"]
        found = {
            str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_file() and not path.is_symlink()
        }
        assert found == set(kept.files)
