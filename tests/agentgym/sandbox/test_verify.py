"""Two-box verification: what a verdict may be, whose fault it is when there is none, and what the limits do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from agentgym.errors import InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.grading.judge_dialogue import Budget
from agentgym.sandbox.grading.verdict import Verdict
from agentgym.sandbox.grading.verify import VerifierPlan, judge_spec, verify
from agentgym.sandbox.spec import VERIFIER_UID, Sandbox

TIERS = [
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("docker", marks=pytest.mark.docker),
]


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
    verdict = judged(code, judge_s=2.0 if reason == "deadline" else 60.0, budget=Budget(runs=5))

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
    verdict = judged(code, solution="while True: pass", judge_s=60.0, budget=Budget(run_s=0.5, total_s=1.2))

    assert (verdict.reason, verdict.score.valid) == ("graded", True), verdict
    assert verdict.log == "['timeout', 'timeout', 'timeout', 'budget', 'budget', 'budget']\n"


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
        ("sleep 600", ("deadline", False, 0.0)),
    ],
)
def test_a_task_folders_verdict(script: str, expected: tuple[str, bool, float], tier: str) -> None:
    with open_sandbox(tier, SandboxSpec()) as box:
        box.write_file("/work/x", b"1")
        judge_s = 1.0 if expected[0] == "deadline" else 60.0
        plan = VerifierPlan({"test.sh": script}, ("/work",), mode="together", judge_s=judge_s)
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
