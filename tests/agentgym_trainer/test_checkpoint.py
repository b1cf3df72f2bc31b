"""A checkpoint is there whole or not at all, and restores the next step bit for bit."""

import pytest
import torch
from gradient_worker import VERSION, Versions, ragged_trajectories, small_model

from agentgym.config import parse_config
from agentgym.errors import CheckpointError
from agentgym_trainer.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from agentgym_trainer.learner import Learner, make_accelerator
from agentgym_trainer.publish import published_weights
from agentgym_trainer.settings import TrainConfig


def learner(seed: int):
    config = parse_config(
        TrainConfig,
        {
            "env": {"id": "maze"},
            "rollout": {"max_staleness": 3},
            "trainer": {"anchor": "ewma", "learning_rate": 1e-2, "schedule": "linear", "steps": 9},
        },
    )
    accelerator = make_accelerator(config)
    model = small_model()
    torch.manual_seed(seed)
    return accelerator, Learner(accelerator, model, config, Versions(model))


def test_the_step_after_a_resume_is_bitwise_that_of_the_run_it_continues(tmp_path):
    accelerator, first = learner(1)
    first.learn(ragged_trajectories(), VERSION)
    save_checkpoint(accelerator, tmp_path, Progress(1, 4, {"next": 3}, 2.5), first.state(), keep=2)
    first.learn(ragged_trajectories(), VERSION + 1)
    expected, drawn = published_weights(first.module), torch.rand(3)

    other, second = learner(2)
    progress, anchor_state = load_checkpoint(other, list_checkpoints(tmp_path)[-1])
    second.load_state(anchor_state)
    assert progress == Progress(1, 4, {"next": 3}, 2.5)
    second.learn(ragged_trajectories(), VERSION + 1)
    for name, weights in published_weights(second.module).items():
        assert (weights == expected[name]).all(), name
    assert torch.equal(torch.rand(3), drawn)


def test_an_unfinished_checkpoint_is_not_listed_and_old_ones_are_removed(tmp_path):
    accelerator, _ = learner(1)
    for step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path, Progress(step, step, {}, 0.0), {}, keep=2)
    (tmp_path / ".step-000004.partial").mkdir()
    (tmp_path / "step-000005").mkdir()  # without progress.json: cut off by a crash before the rename existed
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]


@pytest.mark.parametrize(
    ("raised", "seen", "said"),
    [
        (OSError(28, "No space left on device"), CheckpointError, "step-000002 cannot be written"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_disk_that_refuses_and_ctrl_c_leave_the_checkpoint_before(tmp_path, monkeypatch, raised, seen, said):
    accelerator, _ = learner(1)
    save_checkpoint(accelerator, tmp_path, Progress(1, 1, {}, 0.0), {}, keep=2)

    def full(*_, **__):
        raise raised

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(seen, match=said):
        save_checkpoint(accelerator, tmp_path, Progress(2, 2, {}, 0.0), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("content", ["", "{}", "hello world", None])
@pytest.mark.parametrize(
    "name", ["progress.json", "anchor.pt", "optimizer.bin", "custom_checkpoint_0.pkl", "pytorch_model.bin"]
)
def test_a_broken_checkpoint_is_a_typed_error(tmp_path, name, content):
    accelerator, first = learner(1)
    save_checkpoint(accelerator, tmp_path, Progress(1, 1, {}, 0.0), first.state(), keep=2)
    file = tmp_path / "step-000001" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CheckpointError, match=r"step-000001 cannot be read: \w+: .*; if its files are damaged"):
        load_checkpoint(accelerator, tmp_path / "step-000001")
