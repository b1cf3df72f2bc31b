"""Two-box verification: what the agent made is graded where the agent has never been. Law: the tests never exist in the
agent's box, what leaves that box is hostile bytes that the host has checked, and no verdict is never a zero.

The agent's box is frozen, the declared artifacts are exported through the checked archive, and fresh boxes of another
user grade them, in one of two modes:

*apart* (the default). The judge's program, the tests and all hidden data live in a judge box that never executes,
imports or even stores a byte of the agent's. When it wants the agent's program run, it asks through its descriptors 3
and 4 (`judge.py`), and the host runs it in a *subject* box that holds the artifacts and nothing else. The verdict comes
over the same pipe. Nothing of the agent's can reach it, so a verdict can only be wrong if the judge is fooled by bytes:
it should parse what the subject prints, and never unpickle, evaluate or import it.

*together* (the shape of Harbor's task folders). Tests and artifacts in one fresh box, a command runs under a deadline,
everything in the box is stopped at once, and the worker reads /logs/verifier/reward.txt or reward.json. This protects
against what the agent did to *its* box (replaced programs, waiting processes, verdicts written beforehand, files that
Python, pytest, git or a shell pick up by themselves, which are left out unless they are declared), and it cannot
protect against the artifacts themselves: code of the agent that the tests import shares their process, and code that
they start shares their user, so it can read the tests and write the verdict. A deadline is invalid there, for nobody
can tell whose fault it is. Tests that must hold against an agent that wants to cheat belong in the other mode.
"""

from __future__ import annotations

import contextlib
import posixpath
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from agentgym.errors import (
    ArchiveError,
    InputError,
    SandboxDiedError,
    SandboxError,
    SandboxLimitError,
    SandboxTimeoutError,
    UnavailableError,
)
from agentgym.rewards import Score
from agentgym.sandbox.archive import Archive
from agentgym.sandbox.grading.judge_dialogue import (
    HELPER,
    MESSAGE_BYTES,
    Budget,
    Log,
    OpenBox,
    Subject,
    helper_source,
    judge_apart,
    put_artifacts,
)
from agentgym.sandbox.grading.verdict import Blamed, Reason, Rubric, Ungraded, Verdict, read_json, read_number
from agentgym.sandbox.spec import VERIFIER_UID, WORK_DIRECTORY, Sandbox, SandboxSpec

TESTS = "/tests"
LOGS = "/logs"
OWN_S = 60.0  # for a command of ours that has an end, on a machine that may stand still
REWARD_TEXT, REWARD_JSON = f"{LOGS}/verifier/reward.txt", f"{LOGS}/verifier/reward.json"
COMMANDS = {"apart": ("python3", "judge.py"), "together": ("bash", f"{TESTS}/test.sh")}
# Picked up without being named: by pytest, by Python's start, by build tools. Everything with a leading dot besides
# (.git with its hooks, .bashrc, .local, .pytest.ini, .coveragerc, ...).
AUTOMATIC = frozenset(
    {
        "conftest.py",
        "pytest.ini",
        "pytest.toml",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
        "sitecustomize.py",
        "usercustomize.py",
        "pyvenv.cfg",
        "__pycache__",
    }
)
AUTOMATIC_ENDINGS = (".pth", ".pyc", ".pyo", ".egg-link")


@dataclass(frozen=True, slots=True)
class VerifierPlan:
    """How one task is graded: what is taken out of the agent's box, by which tests, within which limits.

    Example: `VerifierPlan(tests={"judge.py": JUDGE, "secret.json": DATA}, artifacts=("/work/solution.py",))`.
    """

    tests: Mapping[str, bytes | str] | Path  # files for /tests, where `command` starts
    artifacts: tuple[str, ...]  # absolute paths in the agent's box; each must be there
    mode: Literal["apart", "together"] = "apart"
    command: tuple[str, ...] = ()  # (): python3 judge.py, or bash /tests/test.sh
    components: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"reward": (0.0, 1.0)})
    weights: Mapping[str, float] = field(default_factory=dict)
    judge: SandboxSpec | None = None  # None: the agent's image and sizes, hardened
    subject: SandboxSpec | None = None  # None: like the agent's box, without a network
    judge_s: float = 120.0  # for the tests; in the mode `apart` the subject's time is counted by its budget
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if self.mode not in COMMANDS:
            raise InputError(f"the mode of a verification must be one of {sorted(COMMANDS)}, got {self.mode!r}")
        if not self.artifacts:
            raise InputError("a verification needs at least one artifact, such as '/work/solution.py'")
        for path in self.artifacts:
            if not path.startswith("/") or posixpath.normpath(path) != path or path == "/" or "\0" in path:
                raise InputError(f"an artifact must be an absolute path without '.', '..' and '//', got {path!r}")
            if path.split("/")[1] in (TESTS[1:], LOGS[1:]):
                raise InputError(f"the artifact {path!r} lies where the tests are and the verdict is written")
        if not self.judge_s > 0:
            raise InputError(f"judge_s must be > 0, got {self.judge_s}")
        if self.mode == "apart" and not isinstance(self.tests, Path) and HELPER in self.tests:
            raise InputError(f"{HELPER} is the name of our module beside the tests; rename the file")
        Rubric(self.components, self.weights)

    @property
    def rubric(self) -> Rubric:
        return Rubric(self.components, self.weights)


def verify(agent_box: Sandbox, plan: VerifierPlan, open_box: OpenBox) -> Verdict:
    """Freezes the agent's box, which stays frozen, and grades its artifacts in boxes that `open_box` opens. Raises
    InputError for a plan that cannot work; every failure besides is a verdict that names it."""
    started = time.monotonic()
    _check_places(plan, agent_box.spec)
    grading = _Grading(agent_box, plan, open_box)
    try:
        score, reason = grading.grade(), "graded"
    except Blamed as error:
        score, reason = plan.rubric.worst(str(error)), error.reason
    except Ungraded as error:
        score, reason = Score.invalid(str(error)), error.reason
    except (SandboxError, UnavailableError) as error:
        score, reason = Score.invalid(f"{type(error).__name__}: {error}"), "sandbox_failed"
    return grading.verdict(score, reason, time.monotonic() - started)


class _Grading:
    """One verification under way, and what is known about it so far."""

    def __init__(self, agent_box: Sandbox, plan: VerifierPlan, open_box: OpenBox) -> None:
        self._agent_box, self._plan, self._open_box = agent_box, plan, open_box
        self._log = Log()
        self._left_out: tuple[str, ...] = ()
        self._subject: Subject | None = None

    def grade(self) -> Score:
        try:
            if not self._agent_box.frozen:
                self._agent_box.freeze()
            artifacts = _exported(self._agent_box, self._plan.artifacts)
        except (SandboxDiedError, SandboxTimeoutError) as error:
            raise Ungraded("agent_box_died", str(error)) from error
        return self._apart(artifacts) if self._plan.mode == "apart" else self._together(artifacts)

    def verdict(self, score: Score, reason: Reason, seconds: float) -> Verdict:
        runs = self._subject.runs if self._subject else 0
        return Verdict(score, reason, runs, self._left_out, self._log.text, seconds)

    def _apart(self, artifacts: Archive) -> Score:
        plan, agent = self._plan, self._agent_box.spec
        spec = plan.subject or replace(agent, network="none", allow_network=())
        self._subject = Subject(replace(spec, uid=VERIFIER_UID), artifacts, plan.budget, self._open_box)
        with contextlib.closing(self._subject), self._open_box(judge_spec(plan, agent)) as judge:
            self._put_tests(judge)
            judge.write_file(f"{TESTS}/{HELPER}", helper_source().encode())
            command = plan.command or COMMANDS["apart"]
            return judge_apart(judge, command, TESTS, self._subject, plan.rubric, plan.judge_s, self._log)

    def _together(self, artifacts: Archive) -> Score:
        plan = self._plan
        kept, self._left_out = without_automatic(artifacts, plan.artifacts)
        with self._open_box(judge_spec(plan, self._agent_box.spec)) as box:
            put_artifacts(box, kept)
            self._put_tests(box)  # after the artifacts, so that none of them lies in its place
            box.exec(["mkdir", "-p", posixpath.dirname(REWARD_TEXT)], timeout_s=OWN_S)
            try:
                result = box.exec(plan.command or COMMANDS["together"], timeout_s=plan.judge_s, cwd=TESTS)
            except SandboxTimeoutError as error:
                raise Ungraded("deadline", str(error)) from error
            box.freeze()  # nobody writes while the verdict is read
            self._log.add(result.stdout + result.stderr)
            return plan.rubric.score(_reward_files(box, plan.rubric, result.exit_code))

    def _put_tests(self, box: Sandbox) -> None:
        try:
            box.put(self._plan.tests, TESTS)
        except ArchiveError as error:
            raise InputError(f"the tests cannot be put into a box: {error}") from error


def judge_spec(plan: VerifierPlan, agent: SandboxSpec) -> SandboxSpec:
    """The box in which the tests lie, for who keeps such boxes warm."""
    if plan.mode == "apart":
        spec = plan.judge or SandboxSpec(agent.image, agent.memory_mb, agent.cpus, agent.pids, agent.tmpfs_mb)
        return replace(
            spec,
            uid=VERIFIER_UID,
            folders=_with(spec.folders, TESTS),
            output_limit=MESSAGE_BYTES,
            network="none",
            allow_network=(),
        )
    spec = plan.judge or agent
    # no user's site, no start-up file, no home of the agent's
    clean = {"HOME": "/tmp", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return replace(
        spec,
        uid=VERIFIER_UID,
        folders=_with(spec.folders, TESTS, LOGS),
        network=plan.judge.network if plan.judge else "none",
        allow_network=plan.judge.allow_network if plan.judge else (),
        environment={**(plan.judge.environment if plan.judge else {}), **clean},
    )


def _with(folders: tuple[str, ...], *more: str) -> tuple[str, ...]:
    return folders + tuple(folder for folder in more if folder not in folders)


def _check_places(plan: VerifierPlan, agent: SandboxSpec) -> None:
    """A fresh box must have the folders that the artifacts were in."""
    spec = (plan.subject if plan.mode == "apart" else plan.judge) or agent
    places = ("/tmp", WORK_DIRECTORY, *spec.folders)
    for path in plan.artifacts:
        if not spec.writable_root and not any(path == place or path.startswith(place + "/") for place in places):
            raise InputError(f"the artifact {path!r} must lie in a writable folder ({', '.join(places)})")


def _exported(box: Sandbox, paths: tuple[str, ...]) -> Archive:
    """What the policy made of its artifacts is its own doing; that the box or the daemon is gone is not."""
    try:
        return box.export(paths)
    except (SandboxDiedError, SandboxTimeoutError):
        raise
    except (ArchiveError, SandboxLimitError) as error:
        raise Blamed("artifacts_refused", str(error)) from error
    except SandboxError as error:
        raise Blamed("artifacts_missing", str(error)) from error


def without_automatic(artifacts: Archive, declared: tuple[str, ...]) -> tuple[Archive, tuple[str, ...]]:
    """The archive without what programs pick up by themselves, and what that was."""
    files = {path: file for path, file in artifacts.files.items() if not is_automatic("/" + path, declared)}
    needed = {path[:i] for path in files for i, character in enumerate(path) if character == "/"}
    folders = {path for path in artifacts.folders if path in needed or not is_automatic("/" + path, declared)}
    left_out = (set(artifacts.files) | artifacts.folders) - set(files) - folders
    return Archive(files, frozenset(folders)), tuple(sorted("/" + path for path in left_out))


def is_automatic(path: str, declared: tuple[str, ...]) -> bool:
    """Whether a file, or a folder that it lies in, is one that programs pick up by themselves; what was declared is
    wanted: '/work/.git' keeps its hooks, '/work' does not."""
    root = max((known for known in declared if path == known or path.startswith(known + "/")), key=len, default="")
    parts = path[len(root) :].strip("/").split("/") if path != root else []
    return any(part.startswith(".") or part in AUTOMATIC or part.endswith(AUTOMATIC_ENDINGS) for part in parts)


def _reward_files(box: Sandbox, rubric: Rubric, exit_code: int) -> object:
    found: dict[str, bytes] = {}
    for path in (REWARD_TEXT, REWARD_JSON):
        try:
            found[path] = box.read_file(path)
        except (SandboxDiedError, SandboxTimeoutError):
            raise
        except SandboxLimitError as error:
            raise Ungraded("malformed", str(error)) from error
        except SandboxError:
            continue
    if not found:
        raise Ungraded("no_verdict", f"the tests ended with exit code {exit_code} and wrote no {REWARD_TEXT} or .json")
    if len(found) == 2:
        raise Ungraded("malformed", f"there are two verdicts, {REWARD_TEXT} and {REWARD_JSON}")
    if REWARD_JSON in found:
        return read_json(found[REWARD_JSON])
    if len(rubric.ranges) != 1:
        raise Ungraded("malformed", f"{REWARD_TEXT} holds one number, but there are the components {[*rubric.ranges]}")
    return {next(iter(rubric.ranges)): read_number(found[REWARD_TEXT])}
