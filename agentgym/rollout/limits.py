"""What an episode may use. Limits belong to the runner: an environment never knows them."""

from __future__ import annotations

from dataclasses import dataclass

from agentgym.errors import InputError


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Reaching one of these truncates the episode, which is then scored by `env.score_unfinished()`.

    `max_episode_tokens` bounds prompt and completion together, so it is also the context the engine must have.
    `max_episode_s` is looked at between turns: what was sampled is never thrown away. A single completion that takes
    longer than that is no slow policy but a broken engine, and an environment call longer than `max_env_call_s` a
    broken environment: both fail the episode instead of scoring it.

    Example: `EpisodeLimits(max_turns=7, max_tokens_per_turn=8, max_episode_tokens=128)`.
    """

    max_turns: int
    max_tokens_per_turn: int
    max_episode_tokens: int
    max_episode_s: float = 600.0
    max_env_call_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens_per_turn", "max_episode_tokens", "max_episode_s", "max_env_call_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be > 0, got {getattr(self, name)}")
