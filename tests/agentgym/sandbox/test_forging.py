"""A reward cannot be forged: pre-written and background-written verdicts, replaced programs, test reading and hostile
programs do not raise the score, in any tier; and what the mode `together` cannot protect is shown, too."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from agentgym.errors import UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.grading.verdict import Verdict
from agentgym.sandbox.grading.verify import VerifierPlan, verify
from agentgym.sandbox.spec import VERIFIER_UID, Sandbox
from agentgym.testing.sandbox_abuse import FORGERIES, Attack, forging
from agentgym.testing.sandbox_abuse.forging import reading_the_tests

TIERS = [
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("gvisor", marks=pytest.mark.docker),
]
HONEST = "def reverse(items):\n    return items[::-1]\n"
WRONG = "def reverse(items):\n    return items\n"


@functools.cache
def refusal(tier: str) -> str | None:
    """Why boxes of the tier cannot be had here."""
    try:
        open_sandbox(tier, SandboxSpec()).close()
    except UnavailableError as error:
        return str(error)
    return None


def opener(tier: str) -> Callable[[SandboxSpec], Sandbox]:
    """Opens boxes of the tier; skips where it cannot be had."""
    if (why := refusal(tier)) is not None:
        pytest.skip(f"{tier}: {why}")
    return lambda spec: open_sandbox(tier, spec)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("attack", FORGERIES, ids=lambda attack: attack.name)
def test_no_forgery_raises_the_score(attack: Attack, tier: str) -> None:
    outcome = attack.run(opener(tier))

    assert outcome.contained, outcome.what_happened


class Leaky:
    """A box that hands the tests which it is given to every box that is opened later."""

    leaked: dict[str, bytes | str]

    def __init__(self, box: Sandbox, leaked: dict[str, bytes | str]) -> None:
        self._box, self.leaked = box, leaked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._box, name)

    def __enter__(self) -> Leaky:
        return self

    def __exit__(self, *_: object) -> None:
        self._box.close()

    def put(self, source: Any, path: str = "/work") -> None:
        if isinstance(source, Mapping) and "secret.txt" in source:
            self.leaked.update(source)
        elif self.leaked and self._box.spec.uid == VERIFIER_UID:
            self._box.write_file("/tmp/secret.txt", str(self.leaked["secret.txt"]).encode())
        self._box.put(source, path)


@pytest.mark.bubblewrap
def test_tests_that_lie_beside_the_graded_program_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forging, "RUN_S", (30.0,))  # the first grading counts, for the thief as for the honest one
    open_box, leaked = opener("namespace"), dict[str, bytes | str]()

    outcome = reading_the_tests.run(lambda spec: Leaky(open_box(spec), leaked))  # type: ignore[arg-type,return-value]

    assert not outcome.contained
    assert "the reward went to ['the honest solution', 'prints what it finds']" in outcome.what_happened


# ---------------------------------------------------------------------------------------------- hidden pytest tests


def hosts_pytest() -> dict[str, bytes]:
    """pytest as it is installed here, for /tests/lib: the images have none."""
    files: dict[str, bytes] = {}
    for name in ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli"):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the last two are for old Pythons
        for path in distribution.files or ():
            lexer = path.parts[:2] == ("pygments", "lexers") and path.stem not in LEXERS
            if path.suffix == ".py" and ".." not in path.parts and not lexer:
                files[f"lib/{path.as_posix()}"] = path.read_binary()
    return files


LEXERS = ("__init__", "_mapping", "diff", "python")  # those that pytest loads; the rest is most of the megabytes
HIDDEN_TESTS = """
import sys
sys.path.insert(0, "/work")
from package import reverse
def test_reverses(): assert reverse([1, 2, 3]) == [3, 2, 1]
def test_empty(): assert reverse([]) == []
"""
TEST_SCRIPT = """
export PYTHONPATH=/tests/lib
mkdir -p /work/tests && cp /tests/test_hidden.py /work/tests/ && cd /work
python3 -m pytest -q -p no:cacheprovider tests/test_hidden.py
[ $? = 0 ] && echo 1 > /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt
"""
CONFTEST = """
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.outcome, report.longrepr = "passed", None
    return report
"""
PATCHES = {
    "conftest.py": CONFTEST,
    "tests/conftest.py": CONFTEST,
    "pytest.ini": "[pytest]\naddopts = --collect-only\n",
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--collect-only'\n",
    "sitecustomize.py": "import os; os._exit(0)",
}


def with_pytest(box: Sandbox, files: dict[str, str], open_box: Any, artifacts: tuple[str, ...] = ("/work",)) -> Verdict:
    box.exec("rm -rf /work/* /work/.[a-z]*")
    box.put(dict(files))
    tests = {"test.sh": TEST_SCRIPT, "test_hidden.py": HIDDEN_TESTS, **hosts_pytest()}
    verdict = verify(box, VerifierPlan(tests, artifacts, mode="together"), open_box)
    box.thaw()
    return verdict


@pytest.mark.parametrize("tier", [TIERS[0], TIERS[1]])
def test_a_conftest_of_the_agents_does_not_reach_hidden_pytest_tests(tier: str) -> None:
    open_box = opener(tier)
    with open_box(SandboxSpec()) as box:
        for package, expected in ((WRONG, 0.0), (HONEST, 1.0)):
            clean = with_pytest(box, {"package.py": package}, open_box)
            assert (clean.score.valid, clean.score.value, clean.left_out) == (True, expected, ()), clean
            verdict = with_pytest(box, {"package.py": package, **PATCHES}, open_box)
            assert (verdict.score.valid, verdict.score.value) == (True, expected), verdict
            assert verdict.left_out == tuple(sorted(f"/work/{name}" for name in PATCHES))


@pytest.mark.bubblewrap
def test_what_is_declared_goes_along_and_then_forges() -> None:
    """Without this, the test above could pass because the conftest does nothing."""
    open_box = opener("namespace")
    with open_box(SandboxSpec()) as box:
        files = {"package.py": WRONG, "conftest.py": CONFTEST}
        verdict = with_pytest(box, files, open_box, ("/work", "/work/conftest.py"))

    assert (verdict.score.value, verdict.left_out) == (1.0, ())


# ---------------------------------------------------------------------------- the limits of tests beside the artifacts

FORGES_AT_IMPORT = """
import os
for name in ("reward.txt",):
    with open("/logs/verifier/" + name, "w") as file: file.write("1")
os.kill(os.getppid(), 9)  # the script, before it writes its own
os._exit(0)
"""
IMPORTING_SCRIPT = """
cd /tests
python3 -c 'import sys; sys.path.insert(0, "/work"); import package; print(package.reverse([1, 2]))' > /tmp/said
grep -q "2, 1" /tmp/said && echo 1 > /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt
"""
APART = """
import json
from agentgym_judge import subject, verdict
result = subject.run(["python3", "-c", "import sys, json; sys.path.insert(0, '/work'); import package; "
    "print(json.dumps(package.reverse(json.load(sys.stdin))))"], stdin="[1, 2, 3]")
with subject.blame(): verdict(reward=result.ok and json.loads(result.text) == [3, 2, 1])
"""


@pytest.mark.bubblewrap
def test_code_that_the_tests_import_can_forge_together_and_not_apart() -> None:
    open_box = opener("namespace")
    together = VerifierPlan({"test.sh": IMPORTING_SCRIPT}, ("/work/package.py",), mode="together")
    apart = VerifierPlan({"judge.py": APART}, ("/work/package.py",))
    scores: dict[str, list[float]] = {}
    with open_box(SandboxSpec()) as box:
        for name, package in {"forges": FORGES_AT_IMPORT, "wrong": WRONG, "honest": HONEST}.items():
            box.write_file("/work/package.py", package.encode())
            for plan in (together, apart):
                verdict = verify(box, plan, open_box)
                assert verdict.score.valid, verdict
                scores.setdefault(name, []).append(verdict.score.value)
                box.thaw()

    assert scores == {"forges": [1.0, 0.0], "wrong": [0.0, 0.0], "honest": [1.0, 1.0]}, json.dumps(scores)
