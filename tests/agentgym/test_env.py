"""The contract between an environment and whoever plays it."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.env import AgentEnv, ToolEnv
from agentgym.errors import EnvError, InputError, SandboxError, ToolError
from agentgym.messages import Message, ToolCall, call
from agentgym.rewards import Score
from agentgym.tools import tool


class Dice(AgentEnv):
    """Tells a random number; the reply decides what happens."""

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.number = int(rng.integers(1000))
        return f"{task}: {self.number}"

    def reply(self, action: Message) -> str:
        if action.content == "more":
            return str(self.rng.integers(1000))
        self.finish(right=action.content == str(self.number))
        return ""


class Bench(ToolEnv):
    """One tool for each thing that a tool can do."""

    reward_weights = {"good": 2.0}  # noqa: RUF012

    def reset_task(self, task: str, rng: np.random.Generator) -> list[Message]:
        self.log: list[str] = []
        return [Message("system", "Be good."), Message("user", "Begin.")]

    @tool
    def note(self, text: str) -> None:
        """Write down."""
        self.log.append(text)

    @tool
    def look(self, what: Literal["log", "size", "broken", "ugly"] = "log") -> Any:
        """Read."""
        return {"log": self.log, "size": len(self.log), "broken": object(), "ugly": "a\ud800b"}[what]

    @tool
    def stop(self, good: float = 1.0) -> str:
        self.finish(good=good)
        return "over"

    @tool
    def give_up(self) -> None:
        self.finish_invalid("the grader failed")

    @tool
    def fail(self, how: Literal["tool", "bug", "box", "twice"]) -> str:
        if how == "tool":
            raise ToolError("not like this")
        if how == "bug":
            raise ZeroDivisionError("a bug")
        if how == "box":
            raise SandboxError("box b1 is gone")
        self.finish(good=1.0)
        self.finish(good=1.0)
        return ""


def started(env: AgentEnv) -> AgentEnv:
    env.reset(seed=0)
    return env


def ask(env: AgentEnv, action: Message) -> str:
    (message,) = env.step(action)[0]
    assert message.role == "tool"
    assert message.tool_call_id == "call_0"
    return message.content


# ------------------------------------------------------------------------------------------------ seeds and tasks


def test_equal_task_and_seed_start_equal_and_go_on_equal():
    one, two = Dice(), Dice()
    two.reset(seed=99, options={"task": "train-5"})
    two.step(Message("assistant", "more"))
    first, second = (env.reset(seed=7, options={"task": "train-3"}) for env in (one, two))
    assert first == second == ((Message("user", f"train-3: {one.number}"),), {"task_id": "train-3"})
    assert one.step(Message("assistant", "more")) == two.step(Message("assistant", "more"))
    assert one.np_random.bit_generator.state == two.np_random.bit_generator.state


def test_task_and_seed_both_matter():
    starts = set()
    for seed in range(5):
        for task in ("a", "b"):
            env = Dice()
            env.reset(seed=seed, options={"task": task})
            starts.add(env.number)
    assert len(starts) == 10


def test_without_a_task_the_seed_chooses_one_and_without_a_seed_the_env_goes_on():
    env = Dice()
    tasks = {env.reset(seed=seed)[1]["task_id"] for seed in range(20)}
    assert len(tasks) > 10
    assert tasks <= set(env.task_ids("train"))
    assert env.reset(seed=3) == env.reset(seed=np.int64(3))  # pyright: ignore[reportArgumentType]
    assert env.reset() != env.reset()
    unseeded = [Dice().reset(options={"task": "a"})[0] for _ in range(5)]
    assert len(set(unseeded)) > 1


def test_default_tasks_are_split():
    train, heldout = Dice.task_ids("train"), Dice.task_ids("heldout")
    assert len(train) == len(heldout) == 1000
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("options", [{"tasks": "a"}, {"task": 3}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]):
    with pytest.raises(InputError, match="task"):
        Dice().reset(seed=0, options=options)


# ------------------------------------------------------------------------------------------------- order of calls


def test_a_step_needs_a_running_episode():
    env = Dice()
    with pytest.raises(EnvError, match="before reset"):
        env.step(Message("assistant", ""))
    env.reset(seed=0)
    assert env.step(Message("assistant", "no"))[2]
    with pytest.raises(EnvError, match="after the episode ended"):
        env.step(Message("assistant", ""))
    env.reset(seed=0)
    assert not env.finished
    env.step(Message("assistant", "more"))


def test_after_a_failed_step_only_reset_helps():
    env = started(Bench())
    with pytest.raises(ZeroDivisionError):
        env.step(call("fail", how="bug"))
    with pytest.raises(EnvError, match="failed"):
        env.step(call("note", text="a"))
    env.reset(seed=0)
    assert ask(env, call("note", text="a")) == ""


@pytest.mark.parametrize("action", [Message("user", "hi"), "hi", {"role": "assistant"}, Message("assistant", 3)])  # pyright: ignore[reportArgumentType]
def test_an_action_is_an_assistant_message(action: Any):
    env = started(Dice())
    with pytest.raises(InputError, match="role assistant"):
        env.step(action)
    env.step(Message("assistant", "more"))


class Wrong(AgentEnv):
    def __init__(self, opening: Any, answer: Any = "on") -> None:
        self.opening, self.answer = opening, answer

    def reset_task(self, task: str, rng: np.random.Generator) -> Any:
        return self.opening(self) if callable(self.opening) else self.opening

    def reply(self, action: Message) -> Any:
        return self.answer


@pytest.mark.parametrize("opening", ["", (), [3], [Message("tool", "x")], lambda env: env.finish(a=1.0)])
def test_a_bad_opening_is_named(opening: Any):
    with pytest.raises(EnvError, match="Wrong"):
        Wrong(opening).reset(seed=0)


@pytest.mark.parametrize("call_id", ["call_0", "call_1"])
def test_results_in_an_opening_answer_the_calls_before_them(call_id: str):
    opening = (Message("user", "go"), call("look"), Message("tool", "x", tool_call_id=call_id), Message("user", "on"))
    if call_id == "call_0":
        assert Wrong(opening).reset(seed=0)[0] == opening
    else:
        with pytest.raises(EnvError, match="answers no call"):
            Wrong(opening).reset(seed=0)


@pytest.mark.parametrize("answer", ["", [], [Message("assistant", "I")], [Message("system", "obey")], ["text"]])
def test_a_bad_answer_is_named(answer: Any):
    env = started(Wrong("go", answer))
    with pytest.raises(EnvError, match=r"Wrong\.reply\(\)"):
        env.step(Message("assistant", ""))


def test_finishing_twice_or_with_no_number():
    with pytest.raises(EnvError, match="twice"):
        started(Bench()).step(call("fail", how="twice"))
    env = started(Dice())
    with pytest.raises(EnvError, match="takes numbers"):
        env.finish(right="yes")  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------------- scores


def test_the_score_comes_at_the_end():
    env = started(Dice())
    observation, reward, terminated, truncated, info = env.step(Message("assistant", "more"))
    assert (len(observation), reward, terminated, truncated) == (1, 0.0, False, False)
    assert "score" not in info
    observation, reward, terminated, truncated, info = env.step(Message("assistant", str(env.unwrapped.number)))  # pyright: ignore[reportAttributeAccessIssue]
    assert (observation, reward, terminated, truncated) == ((), 1.0, True, False)
    assert info == {"task_id": env.task_id, "score": Score(1.0, {"right": 1.0}, True, "")}


def test_weights_and_invalid_scores():
    _, reward, _, _, info = started(Bench()).step(call("stop", good=0.25))
    assert (reward, info["score"].components) == (0.5, {"good": 0.25})
    _, reward, _, _, info = started(Bench()).step(call("give_up"))
    assert (reward, info["score"]) == (0.0, Score.invalid("the grader failed"))
    assert started(Bench()).score_unfinished() == Score(0.0, {"good": 0.0}, True, "")


class Careless(Dice):
    def reply(self, action: Message) -> str:
        self.finish(ratio=math.nan)
        return ""


def test_nan_is_invalid_and_not_zero():
    _, reward, terminated, _, info = started(Careless()).step(Message("assistant", ""))
    assert (reward, terminated, info["score"].valid) == (0.0, True, False)
    assert "ratio" in info["score"].why


# ------------------------------------------------------------------------------------------------------------ tools


def test_results_become_tool_messages():
    env = started(Bench())
    assert ask(env, call("note", text="a")) == ""
    assert ask(env, call("look")) == '["a"]'
    assert ask(env, call("look", what="size")) == "1"
    ask(env, call("look", what="ugly")).encode()  # half of a surrogate pair cannot go on


def test_errors_become_tool_messages_and_are_counted():
    env = started(Bench())
    assert ask(env, call("fail", how="tool")) == "error: not like this"
    assert ask(env, call("look", what="all")).startswith("error: look: argument 'what' must be one of log, size")
    assert ask(env, call("lok")) == "error: there is no tool 'lok'; the tools are: note, look, stop, give_up, fail"
    unreadable = ask(env, Message("assistant", "", (ToolCall("call_0", "", '{"name": mo'),)))
    assert unreadable.startswith("error: the tool call could not be read; write a tool's name (note, look")
    assert env.step(call("lok"))[4]["tool_errors"] == 1
    assert env.step(call("look"))[4]["tool_errors"] == 0


def test_what_is_not_a_tool_cannot_be_called():
    for name in ("reset", "finish", "close", "__init__", "_answer", "unwrapped"):
        assert ask(started(Bench()), call(name)).startswith("error: there is no tool")


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (call("fail", how="bug"), ZeroDivisionError),
        (call("fail", how="box"), SandboxError),
        (call("look", what="broken"), EnvError),
    ],
)
def test_bugs_and_broken_boxes_go_up(action: Message, error: type[Exception]):
    with pytest.raises(error):
        started(Bench()).step(action)


def test_several_calls_are_answered_in_order_each_with_its_id():
    calls = tuple(
        ToolCall(call_id, name, arguments)
        for call_id, name, arguments in [
            ("a", "note", '{"text": "1"}'), ("b", "note", "{}"), ("c", "look", ""), ("d", "stop", "{}"),
            ("e", "note", '{"text": "2"}'),
        ]
    )  # fmt: skip
    env = started(Bench())
    observation, reward, terminated, _, info = env.step(Message("assistant", "", calls))
    assert [message.tool_call_id for message in observation] == ["a", "b", "c", "d", "e"]
    assert [message.content for message in observation][2:] == ['["1"]', "over", "the episode has ended"]
    assert (reward, terminated, info["tool_errors"]) == (2.0, True, 1)
    assert env.log == ["1"]  # pyright: ignore[reportAttributeAccessIssue]


class OneAtATime(Bench):
    calls_per_message = 1


def test_calls_above_the_bound_are_refused():
    env = started(OneAtATime())
    note = ToolCall("a", "note", '{"text": "1"}')
    observation = env.step(Message("assistant", "", (note, note)))[0]
    assert [message.content for message in observation] == [
        "", "error: only 1 tool call per message is carried out",
    ]  # fmt: skip
    assert env.log == ["1"]  # pyright: ignore[reportAttributeAccessIssue]


class Talker(Bench):
    def on_text(self, text: str) -> str:
        if text == "bye":
            self.finish(good=0.5)
        return text.upper()


def test_text_without_a_call_is_a_hook():
    (reminder,) = started(Bench()).step(Message("assistant", "hello"))[0]
    assert (reminder.role, reminder.content) == ("user", "Call a tool to go on: note, look, stop, give_up, fail.")
    observation, reward, terminated, _, _ = started(Talker()).step(Message("assistant", "bye"))
    assert (observation, reward, terminated) == ((Message("user", "BYE"),), 1.0, True)


def test_subclasses_inherit_replace_and_drop_tools():
    class Fewer(Bench):
        give_up = None  # pyright: ignore[reportAssignmentType]

        @tool
        def note(self, text: str, twice: bool = False) -> None:
            """Write down, again."""

        @tool
        def wave(self) -> None: ...

    assert [spec.name for spec in Fewer.tools] == ["note", "look", "stop", "fail", "wave"]
    assert Fewer.tools[0].description == "Write down, again."
    assert [spec.name for spec in Bench.tools] == ["note", "look", "stop", "give_up", "fail"]


def test_bad_tools_are_found_when_the_class_is_made():
    with pytest.raises(InputError, match=r"Bad\.put: parameter 'where'"):

        class Bad(ToolEnv):
            @tool
            def put(self, where: bytes) -> None: ...

    with pytest.raises(InputError, match=r"'reset' would hide ToolEnv\.reset"):

        class Hiding(ToolEnv):
            @tool
            def reset(self) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


_TEXTS = st.text(st.characters(codec="utf-8"))
_CALLS = st.builds(
    ToolCall,
    _TEXTS,
    st.one_of(_TEXTS, st.sampled_from(["note", "look", "stop", "give_up"])),
    st.one_of(_TEXTS, st.sampled_from(["{}", '{"text": "\\ud800"}', '{"good": NaN}', '{"what": "size"}'])),
)


@given(_TEXTS, st.lists(_CALLS, max_size=4))
def test_whatever_a_policy_says_is_answered(text: str, calls: list[ToolCall]):
    env = started(Bench())
    observation, reward, terminated, truncated, info = env.step(Message("assistant", text, tuple(calls)))
    assert [message.tool_call_id for message in observation] == ([call.call_id for call in calls] or [None])
    assert observation in env.observation_space
    json.dumps([message.to_openai() for message in observation]).encode()
    assert math.isfinite(reward)
    assert not truncated
    assert terminated == ("score" in info)


# ------------------------------------------------------------------------------------------------- constructors


def test_a_constructor_need_not_call_super():
    env = started(Wrong("go"))
    assert env.action_space is env.action_space
    assert env.step(env.action_space.sample())[0] == (Message("user", "on"),)
