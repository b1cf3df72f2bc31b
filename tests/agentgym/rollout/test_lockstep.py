"""Episodes in lockstep: every turn is sampled by the version asked for, and equal plans give equal episodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentgym.errors import VersionError
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.lockstep import Lockstep, registered_turns
from agentgym.trajectory import EpisodeStatus, to_sequences

LIMITS = EpisodeLimits(max_turns=4, max_tokens_per_turn=6, max_episode_tokens=160)


@pytest.fixture(scope="module")
def folder(maze_folder: Path, renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The maze's tokenizer with a random model: it plays nonsense, which is enough."""
    made = tmp_path_factory.mktemp("lockstep") / "model"
    shutil.copytree(maze_folder, made)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def versions(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    model = LlamaForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    made = {}
    for version in range(4):
        made[version] = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return made


@pytest.fixture
def lockstep(folder, versions):
    made = Lockstep(folder, "maze", LIMITS, slots=8, weights=versions.__getitem__, seed=5)
    yield made
    made.close()


def sampled_by(trajectory) -> list[set[int]]:
    return [set(turn.completion.policy_versions) for turn in trajectory.turns]


def test_every_turn_is_sampled_by_the_version_asked_for(lockstep, folder, versions) -> None:
    plans = lockstep.next_groups(3, 4)
    trajectories = lockstep.play(plans, lambda episode, turn: (episode + turn) % 4)
    assert [one.trajectory_id for one in trajectories] == [plan.trajectory_id for plan in plans]
    assert sum(len(one.turns) for one in trajectories) > len(plans)  # some have more than one turn
    for episode, one in enumerate(trajectories):
        assert one.status is not EpisodeStatus.FAILED, one.error
        assert sampled_by(one) == [{(episode + turn) % 4} for turn in range(len(one.turns))]
    check_logprobs(folder, trajectories, versions)


@torch.no_grad()
def check_logprobs(folder, trajectories, versions) -> None:
    """Recorded logprobs are those of the token's own version, whatever the engine had loaded before."""
    model = LlamaForCausalLM.from_pretrained(folder)
    for version, weights in versions.items():
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
        for trajectory in trajectories:
            for row in to_sequences(trajectory):
                own = [place for place, found in enumerate(row.policy_versions) if found == version]
                logprobs = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
                wanted = [float(logprobs[place - 1, row.token_ids[place]]) for place in own]
                assert [row.behavior_logprobs[place] for place in own] == pytest.approx(wanted, abs=1e-4)


def test_equal_plans_give_equal_episodes(folder, versions) -> None:
    played = []
    for seed in (5, 5, 6):
        lockstep = Lockstep(folder, "maze", LIMITS, slots=8, weights=versions.__getitem__, seed=seed)
        trajectories = lockstep.play(lockstep.next_groups(2, 4), lambda episode, turn: turn)
        played.append([(one.task_id, to_sequences(one), one.score) for one in trajectories])
        lockstep.close()
    assert played[0] == played[1]
    assert played[0] != played[2]


def test_siblings_share_their_task_and_not_their_draws(lockstep) -> None:
    plans = lockstep.next_groups(2, 3)
    assert [plan.group_id for plan in plans] == [plans[0].group_id] * 3 + [plans[3].group_id] * 3
    assert len({(plan.task_id, plan.seed) for plan in plans}) == 2
    assert len({plan.sampling_seed for plan in plans}) == 6
    following = lockstep.next_groups(2, 3)
    assert not {plan.trajectory_id for plan in plans} & {plan.trajectory_id for plan in following}


def test_held_out_tasks_are_not_those_of_training(lockstep) -> None:
    heldout = {plan.task_id for plan in lockstep.evaluation(50, "heldout", 1.0, seed=0)}
    training = {plan.task_id for plan in lockstep.next_groups(50, 2)}
    assert len(heldout) == len(training) == 50
    assert not heldout & training


def test_weights_that_are_not_there_end_the_play_and_the_next_one_works(folder, versions) -> None:
    def weights(version: int):
        if version not in versions:
            raise VersionError(f"policy version {version} is not in the log")
        return versions[version]

    lockstep = Lockstep(folder, "maze", LIMITS, slots=8, weights=weights, seed=5)
    with pytest.raises(VersionError, match="version 9 is not in the log"):
        lockstep.play(lockstep.next_groups(1, 2), lambda episode, turn: 9 if turn else 0)
    again = lockstep.play(lockstep.next_groups(1, 2), lambda episode, turn: 1)
    assert all(one.status is not EpisodeStatus.FAILED for one in again)
    lockstep.close()


def test_turns_are_the_environments() -> None:
    assert registered_turns("maze") == 7
