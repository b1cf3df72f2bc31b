"""The rules of tests/conftest.py, on small suites of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project whose component `docker` is missing."""
    monkeypatch.delenv("CI", raising=False)
    pytester.makeini("[pytest]\nmarkers =\n  docker: x\n  slow: x\n  gpu: x\n")
    missing = "\nCOMPONENTS['docker'] = lambda: 'no daemon answers'\n"
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8") + missing)
    return pytester


NEEDS_DOCKER = "import pytest\n@pytest.mark.docker\ndef test_box(): assert False, 'must not run'\n"


def test_a_missing_component_skips_with_its_reason(suite: pytest.Pytester) -> None:
    suite.makepyfile(NEEDS_DOCKER)
    result = suite.runpytest("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*docker: no daemon answers*"])


@pytest.mark.parametrize(
    "source",
    [
        NEEDS_DOCKER,
        "import pytest\ndef test_box(): pytest.skip('no daemon answers')\n",
        "import pytest\n@pytest.mark.skipif(True, reason='no daemon answers')\ndef test_box(): pass\n",
        "import pytest\n@pytest.fixture\ndef box(): pytest.skip('no daemon answers')\ndef test_box(box): pass\n",
    ],
    ids=["component", "call", "mark", "fixture"],
)
def test_where_ci_is_true_a_skip_fails(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(source)
    result = suite.runpytest()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes().get("skipped", 0) == 0
    result.stdout.fnmatch_lines(["*a skip is a failure*no daemon answers*"])


def test_where_ci_is_true_a_skipped_module_fails(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile("import pytest\npytest.importorskip('a_package_that_nobody_has')\ndef test_it(): pass\n")
    result = suite.runpytest()
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.stdout.fnmatch_lines(["*a skip is a failure*a_package_that_nobody_has*"])


def test_where_ci_is_true_an_expected_failure_is_none(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile("import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(): assert False\n")
    suite.runpytest().assert_outcomes(xfailed=1)


SLOW = (
    "import pytest\n" + "".join(f"@pytest.mark.slow\ndef test_{i}(): pass\n" for i in range(8)) + "def test_q(): pass\n"
)


def test_slow_tests_are_deselected_unless_asked_for(suite: pytest.Pytester) -> None:
    suite.makepyfile(SLOW)
    suite.runpytest().assert_outcomes(passed=1, deselected=8)
    suite.runpytest("--run-slow").assert_outcomes(passed=9)


def test_a_sample_of_the_slow_tests_depends_on_its_seed_alone(suite: pytest.Pytester) -> None:
    suite.makepyfile(SLOW)

    def chosen(seed: int) -> tuple[str, ...]:
        result = suite.runpytest("-v", "--slow-sample", "3", "--slow-seed", str(seed))
        result.assert_outcomes(passed=4, deselected=5)
        return tuple(sorted(line.split()[0] for line in result.outlines if " PASSED" in line))

    assert chosen(1) == chosen(1)
    assert len({chosen(seed) for seed in range(5)}) > 1


def test_gpu_tests_are_deselected_unless_asked_for(suite: pytest.Pytester) -> None:
    suite.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): assert False\ndef test_q(): pass\n")
    suite.runpytest().assert_outcomes(passed=1, deselected=1)


def test_workers_share_no_sandbox_and_no_vllm_server(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n  docker: x\n  bubblewrap: x\n  vllm: x\n  slow: x\n  gpu: x\n")
    tests = pytester.mkdir("tests")
    (tests / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8") + "\nCOMPONENTS.clear()\n")
    write = "import os, pytest\ndef note(name): open('who', 'a').write(f'{name} {os.getpid()}\\n')\n"
    for marks in ("docker", "bubblewrap", "vllm"):
        for number in range(3):
            body = f"@pytest.mark.{marks}\ndef test_it(): note('{marks}')\n"
            (tests / f"test_{marks}_{number}.py").write_text(write + body)
    arguments = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider")
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=9)
    workers: dict[str, set[str]] = {}
    for line in (pytester.path / "who").read_text().splitlines():
        name, pid = line.split()
        workers.setdefault(name, set()).add(pid)
    assert workers["docker"] == workers["bubblewrap"]
    assert len(workers["docker"]) == len(workers["vllm"]) == 1
    assert workers["docker"] != workers["vllm"]
