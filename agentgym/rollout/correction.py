"""A correction: a task that is played again by a policy which sees an earlier episode of it. Must never know tokens.

Laws: the earlier episode is shown as the messages that it was, each in its own role, so that nothing it says can forge
a turn (the renderer encodes it as outside text) and no token of it is trained on; and the prompt never says whether the
earlier episode was correct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agentgym.errors import TemplateError
from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.render.protocol import Renderer
from agentgym.rewards import Score
from agentgym.rollout.buffer import ReadyGroup
from agentgym.rollout.summary import is_success, succeeded
from agentgym.trajectory import Trajectory

COMPONENT = "cipo_correct_to_wrong"  # of a revision's score: what is taken off it


@dataclass(frozen=True, slots=True)
class Original:
    """The episode that a correction shows, without its opening.

    Example: `Original("train-3121", 17, correct=False, pass_rate=0.25, oldest_version=4, said=(call("move", dir="up"),
    Message("tool", "hole", tool_call_id="call_0")))`.
    """

    task_id: str
    seed: int
    correct: bool
    pass_rate: float  # share of its group's valid members that were correct
    oldest_version: int  # of its tokens
    said: tuple[Message, ...]  # the policy's messages and the environment's answers; at least one of the former

    @classmethod
    def of(cls, trajectory: Trajectory, pass_rate: float) -> Original:
        """From a trajectory that has turns and sampled tokens."""
        assert trajectory.oldest_version is not None
        said = tuple(message for turn in trajectory.turns for message in (turn.action, *turn.observation))
        return cls(
            trajectory.task_id, trajectory.seed, succeeded(trajectory), pass_rate, trajectory.oldest_version, said
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Correction:
    """What the siblings of a correction group share: task, seed and the original that they see; their episodes are its
    revisions. `number` counts the corrections of a run.

    Example: `Correction(4, original, instruction="Try again.", penalty=0.5)`.
    """

    number: int
    original: Original
    instruction: str
    penalty: float

    @property
    def group_id(self) -> str:
        return f"c-{self.number:06d}"

    @property
    def task_id(self) -> str:
        return self.original.task_id

    @property
    def seed(self) -> int:
        return self.original.seed

    def opening(self, opening: Sequence[Message]) -> tuple[Message, ...]:
        """What the policy sees: the environment's fresh `opening`, the original behind it, and one user message with
        the instruction and the opening's last user message, since the task starts again. Where the environment's last
        word was a user message, that is its head: some templates refuse two in a row."""
        said = list(self.original.said)
        again = next((message.content for message in reversed(opening) if message.role == "user"), "")
        parts = [self.instruction, again]
        if said[-1].role == "user":
            parts.insert(0, said.pop().content)
        return (*opening, *said, Message("user", "\n\n".join(part for part in parts if part)))

    def score(self, score: Score) -> Score:
        """The score of a revision: less by the penalty where it is wrong and the original was not."""
        if not score.valid:
            return score
        taken = self.penalty if self.original.correct and not is_success(score) else 0.0
        return replace(score, value=score.value - taken, components={**score.components, COMPONENT: 0.0 - taken})


def prove_prompts(renderer: Renderer, tools: Sequence[ToolSpec]) -> None:
    """Raises TemplateError for a chat template that refuses a correction's prompt, before any episode does."""
    call = ToolCall("call_0", tools[0].name if tools else "none", "{}")
    endings = [
        (Message("assistant", "No."),),
        (Message("assistant", "No."), Message("user", "Wrong.")),
        (Message("assistant", "", (call,)), Message("tool", "wrong", (), call.call_id)),
    ]
    opening = (Message("user", "Which one?"),)
    for said in endings if tools else endings[:2]:
        correction = Correction(0, Original("", 0, False, 0.0, 0, said), "Try again.", 0.0)
        try:
            renderer.render(correction.opening(opening), tools)
        except TemplateError as error:
            raise TemplateError(f"rollout.cipo cannot be used with this model: {error}") from error


def correction_figures(revised: Sequence[tuple[Correction, ReadyGroup]]) -> Mapping[str, float]:
    """The figures of a batch's correction groups; a rate over no valid revision is left out."""
    revisions = [
        (correction.original.correct, member)
        for correction, group in revised
        for member in group.members
        if member.score is not None and member.score.valid
    ]
    fixed = [succeeded(member) for correct, member in revisions if not correct]
    broken = [not succeeded(member) for correct, member in revisions if correct]
    figures = {
        "cipo/groups": float(len(revised)),
        "cipo/groups_of_correct": float(sum(correction.original.correct for correction, _ in revised)),
    }
    if fixed:
        figures["cipo/wrong_to_correct"] = sum(fixed) / len(fixed)
    if broken:
        figures["cipo/correct_to_wrong"] = sum(broken) / len(broken)
    if revisions:
        values = [member.score.value for _, member in revisions if member.score]
        figures["cipo/reward_mean"] = sum(values) / len(values)
    return figures
