"""Environments: gymnasium.Env subclasses that speak messages.

Owns the contract between an environment and whoever plays it: episodes, seeds, tool calls and scores. Must never know
a token, a policy or a limit. Law: an episode's only randomness is its own generator, made from its seed and task.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np

from agentgym.errors import EnvError, InputError, ToolError
from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.rewards import Score
from agentgym.spaces import ConversationSpace, MessageSpace, is_message
from agentgym.tools import ToolBinding, bind_tool, is_tool

Split = Literal["train", "heldout"]
Observation = tuple[Message, ...]

_IDLE, _STARTING, _RUNNING, _BROKEN = "idle", "starting", "running", "broken"


class AgentEnv(gymnasium.Env[Observation, Message]):
    """An environment of messages. A subclass writes `reset_task` and `reply`, and calls `finish`.

    Example: a single-turn task.

    >>> class Shout(AgentEnv):
    ...     def reset_task(self, task, rng):
    ...         self.word = str(rng.choice(["yes", "no"]))
    ...         return f"Write {self.word} in capitals."
    ...     def reply(self, action):
    ...         self.finish(correct=float(action.content == self.word.upper()))
    ...         return ""
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (the type is gymnasium's)
    blocking: ClassVar[bool] = False  # True: its calls wait (for a sandbox), so a rollout runs them in a thread
    reward_weights: ClassVar[Mapping[str, float]] = {}  # component -> weight in the score; 1 where absent
    tools: tuple[ToolSpec, ...] = ()

    task_id: str
    rng: np.random.Generator  # the episode's only source of randomness

    _phase: str = _IDLE
    _score: Score | None = None

    # ------------------------------------------------------------------------------------ what a subclass writes

    @classmethod
    def task_ids(cls, split: Split) -> Sequence[str]:
        """The tasks of a split, always the same ones in the same order. By default a thousand names, of which each
        only seeds the episode's generator."""
        return [f"{split}-{index}" for index in range(1000)]

    def reset_task(self, task: str, rng: np.random.Generator) -> str | Sequence[Message]:
        """Starts `task` and returns the opening: a user message's text, or messages, among which may be assistant
        messages and the results of their calls (a worked example). `rng` is `self.rng`."""
        raise NotImplementedError

    def reply(self, action: Message) -> str | Sequence[Message]:
        """Answers the policy's message; `""` only when the episode has been finished."""
        raise NotImplementedError

    def score_unfinished(self) -> Score:
        """What an episode is worth that the runner's limits end here: by default every known component is 0."""
        return Score.of(dict.fromkeys(self.reward_weights, 0.0), self.reward_weights)

    # --------------------------------------------------------------------------------------- what a subclass calls

    def finish(self, **components: float) -> None:
        """Ends the episode after this step with named reward components; NaN or infinity makes the score invalid."""
        try:
            values = {name: float(value) for name, value in components.items()}
        except (TypeError, ValueError) as error:
            raise EnvError(f"{type(self).__name__}.finish() takes numbers, got {components!r}") from error
        self._end(Score.of(values, self.reward_weights))

    def finish_invalid(self, why: str) -> None:
        """Ends the episode after this step with a score that says nothing about the policy (a grader failed)."""
        self._end(Score.invalid(why))

    @property
    def finished(self) -> bool:
        """Whether `finish` or `finish_invalid` has been called in this episode."""
        return self._score is not None

    def _end(self, score: Score) -> None:
        if self._phase != _RUNNING:
            raise EnvError(f"{type(self).__name__} finished an episode outside of a step")
        if self._score is not None:
            raise EnvError(f"{type(self).__name__} finished the same episode twice")
        self._score = score

    # ------------------------------------------------------------------------------------------------- gymnasium

    @cached_property
    def action_space(self) -> MessageSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        return MessageSpace("assistant", self.tools)

    @cached_property
    def observation_space(self) -> ConversationSpace:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ConversationSpace()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode of `options["task"]` (else of a training task that the seed chooses).

        Equal seed and task give equal starts. Without a seed the environment's own generator gives one. Raises
        InputError for options that it does not know.
        """
        super().reset(seed=None if seed is None else int(seed))
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.task_id = self._choose_task(options or {})
        self.rng = np.random.default_rng([int(seed), zlib.crc32(self.task_id.encode())])
        self._score, self._phase = None, _STARTING
        roles = ("system", "user", "assistant", "tool")
        opening = self._messages(self.reset_task(self.task_id, self.rng), "reset_task()", roles)
        if not opening:
            raise EnvError(f"{type(self).__name__}.reset_task() gave no opening message")
        self._check_results(opening)
        self._phase = _RUNNING
        return opening, {"task_id": self.task_id}

    def step(self, action: Message) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Answers an assistant message. When the episode ends, the reward is the score's value and `info["score"]`
        the Score; before that the reward is 0. Never truncates: limits belong to who plays.

        Raises EnvError before `reset`, after the end, and after a step that failed.
        """
        if self._phase != _RUNNING or self._score is not None:
            raise EnvError(f"{type(self).__name__}.step() {self._why_not_running()}; call reset() first")
        if not is_message(action) or action.role != "assistant":
            raise InputError(f"an action must be a Message of role assistant, got {action!r}")
        try:
            observation = self._messages(self.reply(action), "reply()", ("user", "tool"))
            if not observation and self._score is None:
                raise EnvError(f"{type(self).__name__}.reply() gave no message though the episode goes on")
        except BaseException:
            self._phase = _BROKEN  # half a step was taken: nobody may go on from here
            raise
        info: dict[str, Any] = {"task_id": self.task_id}
        if self._score is None:
            return observation, 0.0, False, False, info
        info["score"] = self._score
        return observation, self._score.value, True, False, info

    def _check_results(self, opening: Observation) -> None:
        """Results in an opening belong to the calls of the assistant message before them (a worked example)."""
        called: set[str] = set()
        for message in opening:
            if message.role == "tool" and message.tool_call_id not in called:
                name = type(self).__name__
                raise EnvError(f"{name}.reset_task() gave a tool message that answers no call before it: {message!r}")
            if message.role != "tool":
                called = {call.call_id for call in message.tool_calls}

    def _choose_task(self, options: Mapping[str, Any]) -> str:
        if unknown := sorted(set(options) - {"task"}):
            raise InputError(f"reset() knows the option 'task', got {unknown[0]!r}")
        task = options.get("task")
        if task is None:
            tasks = self.task_ids("train")
            return tasks[int(self.np_random.integers(len(tasks)))]
        if not isinstance(task, str):
            raise InputError(f"options['task'] must be a task id (a string), got {task!r}")
        return task

    def _why_not_running(self) -> str:
        if self._score is not None:
            return "was called after the episode ended"
        return "was called after a step that failed" if self._phase == _BROKEN else "was called before reset()"

    def _messages(self, given: str | Sequence[Message], source: str, roles: Sequence[str]) -> Observation:
        if isinstance(given, str):
            return (Message("user", _encodable(given)),) if given else ()
        messages = []
        for message in given:
            if not is_message(message) or message.role not in roles:
                wanted = f"a text or messages of role {', '.join(roles)}"
                raise EnvError(f"{type(self).__name__}.{source} must return {wanted}, got {message!r}")
            content = _encodable(message.content)
            messages.append(message if content is message.content else replace(message, content=content))
        return tuple(messages)


class ToolEnv(AgentEnv):
    """An environment whose @tool methods are the tools of the policy.

    A call with bad arguments, an unknown tool or a ToolError is answered by a tool message that says what is wrong.
    Any other exception of a tool is a bug, or a failure of the infrastructure, and goes up.
    """

    calls_per_message: ClassVar[int | None] = None  # calls above it are refused; a game with a turn limit says 1

    _bindings: ClassVar[Mapping[str, ToolBinding]] = {}
    _tool_errors: int = 0  # calls of this step that were answered by an error

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        namespace = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
        methods = {name: value for name in namespace if is_tool(value := getattr(cls, name, None))}
        for name in methods:
            if hasattr(ToolEnv, name):
                raise InputError(f"{cls.__name__}: a tool named {name!r} would hide ToolEnv.{name}")
        cls._bindings = {name: bind_tool(cls.__name__, name, method, namespace) for name, method in methods.items()}
        cls.tools = tuple(binding.spec for binding in cls._bindings.values())

    def on_text(self, text: str) -> str | Sequence[Message]:
        """Answers a message that calls no tool; by default a reminder of the tools."""
        return f"Call a tool to go on: {', '.join(self._bindings)}."

    def step(self, action: Message) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """As AgentEnv.step; `info["tool_errors"]` counts the calls that were answered by an error."""
        self._tool_errors = 0
        result = super().step(action)
        result[4]["tool_errors"] = self._tool_errors
        return result

    def reply(self, action: Message) -> str | Sequence[Message]:
        if not action.tool_calls:
            return self.on_text(action.content)
        return [
            Message("tool", self._answer(call, index), tool_call_id=call.call_id)
            for index, call in enumerate(action.tool_calls)
        ]

    def _answer(self, call: ToolCall, index: int) -> str:
        if self.finished:
            return "the episode has ended"
        try:
            if self.calls_per_message is not None and index >= self.calls_per_message:
                raise ToolError(f"only {self.calls_per_message} tool call per message is carried out")
            binding = self._bindings.get(call.name)
            if binding is None:
                raise ToolError(self._unknown(call))
            result = getattr(self, call.name)(**binding.decode_arguments(call.arguments))
        except ToolError as error:
            self._tool_errors += 1
            return f"error: {error}"
        return self._result_text(call.name, result)

    def _unknown(self, call: ToolCall) -> str:
        known = ", ".join(self._bindings) or "none"
        if not call.name:
            return f"the tool call could not be read; write a tool's name ({known}) and its arguments as a JSON object"
        return f"there is no tool {call.name[:60]!r}; the tools are: {known}"

    def _result_text(self, name: str, result: Any) -> str:
        if isinstance(result, str):
            return result
        if result is None:
            return ""
        try:
            return json.dumps(result)
        except (TypeError, ValueError) as error:
            raise EnvError(f"{type(self).__name__}.{name} must return text or JSON values, got {result!r}") from error


def _encodable(text: str) -> str:
    """`text` without halves of surrogate pairs, which cannot be written as UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text
