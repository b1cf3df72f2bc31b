"""Two-box verification: what a verdict may be, whose fault it is when there is none, and what the limits do."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ArchiveError, InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.archive import Archive
from agentgym.sandbox.judge_dialogue import Budget, Subject, read_request
from agentgym.sandbox.spec import VERIFIER_UID, Sandbox
from agentgym.sandbox.verdict import Rubric, Ungraded, Verdict, read_json, read_number
from agentgym.sandbox.verify import VerifierPlan, is_automatic, judge_spec, verify, without_automatic

TIERS = [
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("docker", marks=pytest.mark.docker),
]
NEVER = SandboxSpec()
numbers = st.one_of(
    st.floats(), st.integers(), st.integers(10**400, 10**401), st.booleans(), st.none(), st.text(max_size=3)
)


def open_namespace(spec: SandboxSpec) -> Sandbox:
    return open_sandbox("namespace", spec)


def judged(
    code: str, open_box: Callable[[SandboxSpec], Any] = open_namespace, solution: str = "print('hi')", **changes: Any
) -> Verdict:
    """Grades `solution` by a judge with this code."""
    with open_namespace(SandboxSpec()) as box:
        box.write_file("/work/solution.py", solution.encode())
        helper = "from agentgym_judge import *\nfrom agentgym_judge import subject, verdict, SubjectError\n"
        plan = VerifierPlan({"judge.py": helper + code}, ("/work/solution.py",), **changes)
        return verify(box, plan, open_box)


RUN = "subject.run(['python3', '/work/solution.py'])"


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


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"artifacts": ()}, "at least one artifact"),
        ({"artifacts": ("work/x",)}, "absolute path"),
        ({"artifacts": ("/work/../etc",)}, "absolute path"),
        ({"artifacts": ("/",)}, "absolute path"),
        ({"artifacts": ("/tests/x",)}, "where the tests are"),
        ({"artifacts": ("/logs/verifier",)}, "where the tests are"),
        ({"mode": "alone"}, "must be one of"),
        ({"judge_s": 0.0}, "judge_s"),
        ({"judge_s": float("nan")}, "judge_s"),
        ({"components": {}}, "at least one component"),
        ({"components": {"a": (1.0, 1.0)}}, "range"),
        ({"components": {"a": (0.0, math.inf)}}, "range"),
        ({"weights": {"b": 1.0}}, "weight"),
        ({"tests": {"agentgym_judge.py": ""}}, "rename the file"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        VerifierPlan(**{"tests": {"judge.py": ""}, "artifacts": ("/work/x",), **changes})


@pytest.mark.parametrize("name", ["runs", "run_s", "total_s", "output_bytes"])
def test_a_budget_without_room_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        Budget(**{name: 0})


def test_the_judges_box_is_hardened_whatever_the_agents_is() -> None:
    agent = SandboxSpec(network="bridge", writable_root=True, run_as_root=True, environment={"PYTHONPATH": "/work"})

    apart = judge_spec(VerifierPlan({}, ("/work/x",)), agent)
    together = judge_spec(VerifierPlan({}, ("/work/x",), mode="together"), agent)

    assert apart.relaxations == ()
    assert (apart.uid, apart.environment, apart.folders) == (VERIFIER_UID, {}, ("/tests",))
    assert (together.uid, together.network) == (VERIFIER_UID, "none")
    assert "PYTHONPATH" not in together.environment


@pytest.mark.bubblewrap
def test_an_artifact_that_no_fresh_box_could_take_is_refused() -> None:
    with open_namespace(SandboxSpec()) as box, pytest.raises(InputError, match="writable folder"):
        verify(box, VerifierPlan({"judge.py": ""}, ("/usr/bin/python3",)), open_namespace)


# ------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize("tier", TIERS)
def test_a_judge_runs_reads_and_writes_in_the_subjects_box(tier: str) -> None:
    code = """
subject.write("/work/input", "3 4")
first = subject.run(["python3", "/work/solution.py"], cwd="/work")
assert (first.exit_code, first.text, first.stderr, first.ok) == (3, "hi\\n", b"err\\n", False), first
assert subject.read("/work/output") == b"7"
assert subject.run("cat; exit 1", stdin="in").stdout == b"in"
assert subject.run(["no-such-program"]).exit_code == 127
assert subject.run("true", cwd="/nowhere").why == "refused"
assert subject.run("sleep 9", timeout_s=0.2).why == "timeout"
subject.fresh()
try: subject.read("/work/output")
except SubjectError as error: assert "output" in str(error)
else: raise AssertionError("the file of the old box is there")
print("the judge's own words")
verdict(reward=0.25)
"""
    solution = """
import sys
a, b = map(int, open("/work/input").read().split())
open("/work/output", "w").write(str(a + b)); print("hi"); print("err", file=sys.stderr); sys.exit(3)
"""
    verdict = judged(code, lambda spec: open_sandbox(tier, spec), solution)

    assert (verdict.score.value, verdict.score.valid, verdict.reason) == (0.25, True, "graded"), verdict
    assert verdict.runs == 9
    assert verdict.log == "the judge's own words\n"


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        ("pass", "no_verdict", "without a verdict"),
        ("raise ValueError('lost')", "judge_crashed", "ValueError: lost"),
        ("while True: pass", "deadline", "deadline"),
        ("verdict(reward=float('nan'))", "not_finite", "nan"),
        ("verdict(reward=2)", "out_of_range", "[0, 1]"),
        ("verdict(other=1)", "malformed", "['reward']"),
        ("import os; os.write(4, b'\\0\\0\\0\\5hello')", "malformed", "not JSON"),
        ("import os; os.write(4, b'\\0\\0\\0\\2[]')", "malformed", "no object"),
        ("while True: subject.run('true')", "too_much", "more than 5 times"),
        ("subject.run('a\\0b')", "malformed", "cannot be run"),
        ("subject.run('true', timeout_s=-1)", "malformed", "-1 seconds"),
        ("subject.run('true', stdin=bytes(5 * 2**20))", "judge_crashed", "too much for one run"),
    ],
)
def test_a_judge_that_fails_gives_no_score(code: str, reason: str, said: str) -> None:
    verdict = judged(code, judge_s=2.0, budget=Budget(runs=5))

    assert (verdict.reason, verdict.score.valid) == (reason, False), verdict
    assert said in verdict.score.why


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    "code",
    [
        "subject.read('/work/absent')",
        f"with subject.blame(): int({RUN}.text)",
        f"with subject.blame(): assert {RUN}.text == 'ho'",
        "subject.write('/work/no/such/folder', b'')",
    ],
)
def test_what_the_subject_does_not_deliver_is_its_own_fault(code: str) -> None:
    verdict = judged(code, components={"reward": (-1.0, 1.0)})

    assert (verdict.reason, verdict.score.valid, verdict.score.value) == ("subject_failed", True, -1.0), verdict
    assert verdict.score.why


@pytest.mark.bubblewrap
def test_a_subject_cannot_use_up_the_judges_time() -> None:
    """Invalid instead of zero would be an escape; so its time is counted apart, and what is beyond it does not run."""
    code = f"reasons = [{RUN}.why for _ in range(6)]\nprint(reasons)\nverdict(reward=0)"
    started = time.monotonic()

    verdict = judged(code, solution="while True: pass", judge_s=5.0, budget=Budget(run_s=0.5, total_s=1.2))

    assert (verdict.reason, verdict.score.valid) == ("graded", True), verdict
    assert verdict.log == "['timeout', 'timeout', 'timeout', 'budget', 'budget', 'budget']\n"
    assert time.monotonic() - started < 5


@pytest.mark.bubblewrap
def test_a_subject_cannot_flood_the_host() -> None:
    code = f"print([(r.why, r.dropped_bytes > 0) for r in [{RUN} for _ in range(4)]])\n"

    verdict = judged(
        code + "verdict(reward=0)", solution="print('x' * 3_000_000)", budget=Budget(output_bytes=5_000_000)
    )

    assert verdict.log == "[('', True), ('', True), ('budget', False), ('budget', False)]\n"


# --------------------------------------------------------------------------------------------- whose fault a death is


class Fragile:
    """A box that dies at its first `exec`."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    def __getattr__(self, name: str) -> Any:
        return getattr(self._box, name)

    def exec(self, *arguments: Any, **options: Any) -> Any:
        self._box.close()
        return self._box.exec(*arguments, **options)


def dying(deaths: int) -> Callable[[SandboxSpec], Any]:
    """Opens boxes; the first `deaths` subject boxes die when something is run in them."""
    left = [deaths]

    def open_box(spec: SandboxSpec) -> Any:
        box = open_namespace(spec)
        if "/tests" not in spec.folders and left[0] > 0:
            left[0] -= 1
            return Fragile(box)
        return box

    return open_box


@pytest.mark.bubblewrap
@pytest.mark.parametrize(("deaths", "why", "value"), [(1, "", 1.0), (2, "died", 0.0)])
def test_a_subjects_box_that_dies_twice_is_the_subjects_doing(deaths: int, why: str, value: float) -> None:
    verdict = judged(f"result = {RUN}\nprint(result.why)\nverdict(reward=result.ok)", dying(deaths))

    assert (verdict.score.valid, verdict.score.value, verdict.log) == (True, value, f"{why}\n"), verdict


@pytest.mark.bubblewrap
@pytest.mark.parametrize("kind", [SandboxDiedError, SandboxError, UnavailableError])
@pytest.mark.parametrize("which", ["judge", "subject"])
def test_a_box_that_cannot_be_opened_is_nobodys_zero(which: str, kind: type[Exception]) -> None:
    def open_box(spec: SandboxSpec) -> Sandbox:
        if ("/tests" in spec.folders) is (which == "judge"):
            raise kind("no room")
        return open_namespace(spec)

    verdict = judged(f"verdict(reward={RUN}.ok)", open_box)

    assert (verdict.reason, verdict.score.valid) == ("sandbox_failed", False)
    assert f"{kind.__name__}: no room" in verdict.score.why


@pytest.mark.bubblewrap
def test_a_dead_box_of_the_agents_is_nobodys_zero() -> None:
    box = open_namespace(SandboxSpec())
    box.close()

    verdict = verify(box, VerifierPlan({"judge.py": "pass"}, ("/work/x",)), open_namespace)

    assert (verdict.reason, verdict.score.valid) == ("agent_box_died", False)


@pytest.mark.bubblewrap
def test_every_box_of_a_verification_is_closed_and_the_agents_stays_frozen() -> None:
    opened: list[Sandbox] = []

    def open_box(spec: SandboxSpec) -> Sandbox:
        opened.append(open_namespace(spec))
        return opened[-1]

    with open_namespace(SandboxSpec()) as box:
        box.write_file("/work/x", b"")
        for code in ("from agentgym_judge import *\nsubject.run('true'); verdict(reward=1)", "1 / 0"):
            verify(box, VerifierPlan({"judge.py": code}, ("/work/x",)), open_box)
            assert box.frozen
    assert len(opened) == 3
    assert {each.spec.uid for each in opened} == {VERIFIER_UID}
    for each in opened:
        with pytest.raises(SandboxDiedError):
            each.ping()


# ------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 0.5 > /logs/verifier/reward.txt", ("graded", True, 0.5)),
        ("echo '{\"reward\": 1}' > /logs/verifier/reward.json; exit 3", ("graded", True, 1.0)),
        ("cat /work/x > /logs/verifier/reward.txt", ("graded", True, 1.0)),
        ("id -u > /tmp/u; [ $(cat /tmp/u) = 10002 ] && echo 1 > /logs/verifier/reward.txt", ("graded", True, 1.0)),
        ("echo nan > /logs/verifier/reward.txt", ("not_finite", False, 0.0)),
        ("echo 2 > /logs/verifier/reward.txt", ("out_of_range", False, 0.0)),
        ("echo 1 > /logs/verifier/reward.txt; echo '{}' > /logs/verifier/reward.json", ("malformed", False, 0.0)),
        ("ln -s /dev/zero /logs/verifier/reward.txt", ("no_verdict", False, 0.0)),
        ("exit 0", ("no_verdict", False, 0.0)),
        ("sleep 60", ("deadline", False, 0.0)),
    ],
)
def test_a_task_folders_verdict(script: str, expected: tuple[str, bool, float], tier: str) -> None:
    with open_sandbox(tier, SandboxSpec()) as box:
        box.write_file("/work/x", b"1")
        plan = VerifierPlan({"test.sh": script}, ("/work",), mode="together", judge_s=1.0)
        verdict = verify(box, plan, lambda spec: open_sandbox(tier, spec))

    assert (verdict.reason, verdict.score.valid, verdict.score.value) == expected, verdict


@pytest.mark.bubblewrap
def test_a_task_folders_verdict_may_have_several_components() -> None:
    plan = VerifierPlan(
        {"test.sh": f"echo '{json.dumps({'a': 1, 'b': -1})}' > /logs/verifier/reward.json"},
        ("/work",),
        mode="together",
        components={"a": (0.0, 1.0), "b": (-1.0, 1.0)},
        weights={"b": 0.5},
    )
    with open_namespace(SandboxSpec()) as box:
        verdict = verify(box, plan, open_namespace)

    assert (verdict.score.value, verdict.score.components) == (0.5, {"a": 1.0, "b": -1.0})
