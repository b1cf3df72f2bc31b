"""Names, plug-ins, files and modules."""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from agentgym import registry
from agentgym.env import AgentEnv
from agentgym.errors import InputError, UnknownNameError
from agentgym.messages import Message


class Echo(AgentEnv):
    def __init__(self, greeting: str = "hi") -> None:
        self.greeting = greeting

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        return self.greeting

    def reply(self, action: Message) -> str:
        return action.content or "?"


class Other(Echo):
    pass


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_plugins()
    monkeypatch.setattr(registry, "_records", dict(registry._records))
    monkeypatch.setattr(registry, "_broken_plugins", {})
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))


# ---------------------------------------------------------------------------------------------------- registration


def test_a_registered_class_is_found_and_made():
    registry.register("test_registry/Echo-v0", Echo, max_turns=4, alias="echo", greeting="hello")
    record = registry.lookup("echo")
    assert record == registry.lookup("test_registry/Echo-v0")
    assert (record.env_id, record.max_turns, record.oracle, record.habit) == ("test_registry/Echo-v0", 4, None, None)
    assert record.env_class is Echo
    env = registry.make("echo")
    assert env.spec.id == "test_registry/Echo-v0"
    assert type(env) is Echo
    assert env.greeting == "hello"
    assert registry.make("echo", greeting="hey").greeting == "hey"
    limited = gymnasium.make("test_registry/Echo-v0")
    assert limited.spec is not None
    assert limited.spec.max_episode_steps == 4


def test_the_same_class_again_replaces_and_another_class_is_refused():
    registry.register("test_registry/Echo-v0", Echo, max_turns=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Gymnasium warns of names taken twice
        registry.register("test_registry/Echo-v0", Echo, max_turns=5)
    assert registry.lookup("test_registry/Echo-v0").max_turns == 5
    with pytest.raises(InputError, match=r"already registered for .*Echo"):
        registry.register("test_registry/Echo-v0", Other, max_turns=4)
    with pytest.raises(InputError, match=r"'maze' already means agentgym/Maze-v0"):
        registry.register("test_registry/Other-v0", Other, max_turns=4, alias="maze")
    assert registry.lookup("maze").env_id == "agentgym/Maze-v0"


@pytest.mark.parametrize("env_id", ["Echo-v0", "my/Echo!v0", "", "a/b/c-v0"])
def test_bad_ids(env_id: str):
    with pytest.raises(InputError, match="environment id"):
        registry.register(env_id, Echo, max_turns=1)


def test_max_turns_must_be_positive():
    with pytest.raises(InputError, match="max_turns must be >= 1, got 0"):
        registry.register("test_registry/Echo-v0", Echo, max_turns=0)


def test_bad_constructor_arguments_are_the_persons_turn():
    registry.register("test_registry/Echo-v0", Echo, max_turns=4)
    with pytest.raises(InputError, match=r"cannot be made with \{'greting': 'hey'\}"):
        registry.make("test_registry/Echo-v0", greting="hey")


def test_agents_may_be_named_as_text():
    registry.register("test_registry/Echo-v0", Echo, max_turns=4, oracle="agentgym.agents:nop", habit="no.where:nop")
    record = registry.lookup("test_registry/Echo-v0")
    from agentgym.agents import nop

    assert record.oracle is nop
    with pytest.raises(InputError, match=r"no\.where:nop"):
        _ = record.habit


# ---------------------------------------------------------------------------------------------------------- look-up


def test_unknown_names_get_the_nearest():
    for wrong in ("mase", "agentgym/Mase-v0"):
        with pytest.raises(UnknownNameError, match=r"did you mean '(maze|agentgym/Maze-v0)'"):
            registry.lookup(wrong)


def test_bundled_environments_are_plugins():
    ids = [record.env_id for record in registry.known_envs()]
    assert ids == sorted(ids)
    assert {f"agentgym/{name}-v0" for name in ("Maze", "GuessNumber", "ReverseText", "PythonMath")} <= set(ids)
    for record in registry.known_envs():
        if record.env_id.startswith("agentgym/"):  # other tests register their own
            assert record.oracle is not None, record.env_id


FILE = """
    from __future__ import annotations
    import enum
    import agentgym as ag

    class Side(enum.Enum):
        LEFT = "left"

    class Door(ag.ToolEnv):
        def reset_task(self, task, rng):
            return "Open it."

        @ag.tool
        def open(self, side: Side) -> str:
            "Open."
            self.finish(open=1.0)
            return "open"

    ag.register("mine/Door-v0", Door, max_turns=1, oracle=lambda env, history, rng: ag.call("open", side="left"))
"""


def test_an_environment_in_a_file(tmp_path: Path):
    path = tmp_path / "my env.py"
    path.write_text(textwrap.dedent(FILE))
    env = registry.make(f"{path}:mine/Door-v0")
    env.reset(seed=0)
    oracle = registry.lookup(f"{path}:mine/Door-v0").oracle
    assert oracle is not None
    assert env.step(oracle(env, (), env.rng))[1] == 1.0
    with pytest.raises(UnknownNameError, match="did you mean 'mine/Door-v0'"):
        registry.lookup(f"{path}:mine/Dor-v0")


def test_an_environment_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "test_registry_doors.py").write_text(textwrap.dedent(FILE).replace("mine/", "module/"))
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.lookup("test_registry_doors:module/Door-v0").max_turns == 1
    assert gymnasium.make("module/Door-v0").reset(seed=0)[0][0].content == "Open it."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def broken(:", "SyntaxError"),
        ("undefined_name", r"NameError: .*bad\.py:1"),
        (None, "there is no environment file"),
    ],
)
def test_files_that_cannot_be_loaded(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    before = set(sys.modules)
    for _ in range(2):  # a failed attempt leaves nothing behind
        with pytest.raises(InputError, match=message):
            registry.lookup(f"{path}:mine/Bad-v0")
    assert not [name for name in set(sys.modules) - before if "bad" in name]


def test_a_module_that_cannot_be_loaded():
    with pytest.raises(InputError, match=r"'no_such_module'.*ModuleNotFoundError"):
        registry.lookup("no_such_module:mine/Bad-v0")


# --------------------------------------------------------------------------------------------------------- plug-ins


def install(folder: Path, name: str, module: str, source: str) -> None:
    """A distribution as pip leaves it, with one entry point."""
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.PLUGIN_GROUP}]\n{module} = {module}\n")


def test_an_installed_plugin_is_loaded_when_its_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    install(tmp_path, "test-doors", "test_registry_plugin", textwrap.dedent(FILE).replace("mine/", "plugin/"))
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.lookup("plugin/Door-v0").env_id == "plugin/Door-v0"


def test_a_broken_plugin_is_named_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    install(tmp_path, "test-broken", "test_registry_broken", "import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(UnknownNameError) as raised:
        registry.lookup("broken/Env-v0")
    assert "of test-broken cannot be imported: ModuleNotFoundError" in str(raised.value)
    assert [record.message for record in caplog.records if "test-broken" in record.message]
    assert registry.lookup("maze").env_id == "agentgym/Maze-v0"
    assert len(registry.known_envs()) >= 4
