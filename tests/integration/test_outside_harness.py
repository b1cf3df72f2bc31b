"""A harness that no one here wrote solves a task in a box through a session, and what it did trains a model.

mini-swe-agent runs in an environment of its own (`.venv-agents`), since its pins are not ours. The policy behind the
server is scripted: it emits the token ids of chosen replies, one byte a token, which no tokenizer would write so.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from agentgym.config import parse_config
from agentgym.engine.protocol import Engine
from agentgym.render import ChatTemplateRenderer, load_renderer
from agentgym.rollout.store import read_trajectories, step_file
from agentgym.server.app import create_app
from agentgym.server.client import ServiceClient
from agentgym.server.door import Limits
from agentgym.server.keys import Keyring, Keys
from agentgym.server.process import listen, serve_http, url
from agentgym.server.service import RolloutService
from agentgym.server.settings import ServiceConfig
from agentgym.server.wire import Batch
from agentgym.testing.scripted_engine import ScriptedEngine, forced_logits
from agentgym.versions import VersionReader
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.settings import TrainConfig

ROOT = Path(__file__).parents[2]
AGENTS = ROOT / ".venv-agents" / "bin" / "python"
EXAMPLE = ROOT / "docs" / "examples" / "mini_swe_agent.py"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = 8192
VOCABULARY = 258  # 256 bytes, two marks


def bash(command: str, thought: str) -> str:
    arguments = json.dumps({"name": "bash", "arguments": {"command": command}})
    return f"{thought}\n<tool_call>\n{arguments}\n</tool_call>"


SUBMIT = bash("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", "Done.")
SCRIPTS = {
    "right": [bash("ls -la; whoami", "Look first."), "I forgot to call the tool.",
              bash("expr 6 '*' 7 > answer.txt && cat answer.txt", "Multiply — carefully."), SUBMIT],
    "wrong": [bash("echo 41 > answer.txt", "I guess."), SUBMIT],
}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A random model of tokens that are a byte each, with a template that knows no tools."""
    folder = tmp_path / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return folder


def scripted_policy(renderer: ChatTemplateRenderer) -> ScriptedEngine:
    """Says the replies of a script in turn; the task's text says which script. The harness takes back a reply without
    a call, and says so, so that its complaints are counted as replies."""
    outside = renderer.encoder.outside
    end = renderer.stop_token_ids[0]
    begin = renderer.encoder.scaffold("<|im_start|>assistant\n")
    complaint = outside("No tool calls found")
    scripts = [
        (outside(f"attempt {name}"), [[*outside(text), end] for text in replies]) for name, replies in SCRIPTS.items()
    ]

    def next_token(prefix: Sequence[int]) -> int:
        ids = list(prefix)
        replies = next(replies for name, replies in scripts if places(ids, name))
        begun = places(ids, begin)
        reply = replies[len(begun) - 1 + len(places(ids, complaint))]
        return reply[len(ids) - begun[-1] - len(begin)]

    return ScriptedEngine(forced_logits(VOCABULARY, next_token), max_context=CONTEXT)


def places(ids: list[int], part: list[int]) -> list[int]:
    return [i for i, token in enumerate(ids) if token == part[0] and ids[i : i + len(part)] == part]


@pytest.fixture
def service(model_folder: Path, tmp_path: Path) -> Iterator[tuple[str, ServiceClient]]:
    """A service in a thread that trains on sessions, with the scripted policy."""
    config = settings(model_folder).service()
    listener = listen(config.server)
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    renderer = load_renderer(model_folder)

    async def engine(_: ServiceConfig, __: Path) -> Engine:
        return scripted_policy(renderer)

    async def main() -> None:
        (tmp_path / "versions").mkdir()
        running = await RolloutService.start(config, model_folder, tmp_path, tmp_path / "versions", engine)
        stop = asyncio.Event()
        app = create_app(running, Keyring(Keys("trainer-key", None)), stop.set, Limits.of(config.server))
        loop = asyncio.get_running_loop()
        try:
            stopped = asyncio.ensure_future(stop.wait())
            await serve_http(app, listener, lambda: ready.set_result((loop, stop)), stopped, 0.5, asyncio.Event())
        finally:
            await running.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    loop, stop = ready.result(120)
    address = url(listener, config.server)
    try:
        with ServiceClient(address, "trainer-key") as client:
            yield address, client
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)


def settings(model_folder: Path) -> TrainConfig:
    values = {
        "env": {"id": "guess_number"},  # plays nothing here
        "model": {"name": str(model_folder)},
        "rollout": {"source": "sessions", "group_size": 2, "groups_per_step": 1, "max_episode_tokens": CONTEXT},
        # The scripted policy is not the model that learns: its logprobs stand in for old ones.
        "trainer": {"anchor": "behavior", "learning_rate": 1e-3, "steps": 1},
        "loss": {"correction": "none"},
    }
    return parse_config(TrainConfig, values)


def run_harness(address: str, script: str, home: Path) -> dict[str, Any]:
    task = f"Write the product of 6 and 7 into answer.txt. This is the attempt {script}."
    command = [AGENTS, EXAMPLE, address, "--task", task, "--name", "product", "--expect", "42", "--tier", "namespace"]
    environment = {
        **os.environ,
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "2",
        "PYTHONPATH": str(ROOT),
        "MSWEA_GLOBAL_CONFIG_DIR": str(home),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.bubblewrap
def test_mini_swe_agent_solves_a_task_in_a_box_and_its_trajectory_trains(service, model_folder, tmp_path):
    if not AGENTS.exists():
        pytest.skip(f"no harness: {AGENTS} is missing (python -m venv .venv-agents; pip install mini-swe-agent==2.4.6)")
    address, client = service
    client.collect(True)
    right, wrong = (run_harness(address, script, tmp_path / "home") for script in ("right", "wrong"))
    assert (right["exit_status"], right["reward"]) == ("Submitted", 1.0)
    assert (wrong["exit_status"], wrong["reward"]) == ("Submitted", 0.0)
    # the harness took back the reply without a call, and went on from the one before
    assert right["session"]["links"] == {"opening": 1, "continuation": 2, "branch": 1}
    batch = client.take_batch(0, timeout_s=60, step=1)
    check_tokens(batch, model_folder, tmp_path)
    learn_from(batch, model_folder, tmp_path)


def check_tokens(batch: Batch, model_folder: Path, run_dir: Path) -> None:
    renderer = load_renderer(model_folder)
    (group,) = batch.groups
    assert batch.metrics["delivered_fraction"] == 1.0
    episodes = {trajectory.trajectory_id: trajectory for trajectory in read_trajectories(step_file(run_dir, 1))}
    for member, script in zip(group.members, ("right", "wrong"), strict=True):
        turns = episodes[member.trajectory_id].turns
        assert sorted(renderer.encoder.decode(turn.completion.token_ids[:-1]) for turn in turns) == sorted(
            SCRIPTS[script]
        )
        trained = [t for row in member.sequences for t, loss in zip(row.token_ids, row.loss_mask) if loss]
        spelled = [[*renderer.encoder.outside(text), renderer.stop_token_ids[0]] for text in SCRIPTS[script]]
        assert sorted(trained) == sorted(token for ids in spelled for token in ids)
        assert len(member.sequences) == (2 if script == "right" else 1)
    text = renderer.encoder.decode(group.members[0].sequences[0].token_ids)
    assert "uid=" not in text  # the box's answers are in the row as the harness showed them
    assert "<returncode>0</returncode>" in text


def learn_from(batch: Batch, model_folder: Path, run_dir: Path) -> None:
    """One optimizer step, whose gradient is finite and not zero."""
    config = settings(model_folder)
    learner = Learner(make_accelerator(config), load_model(model_folder, config), config, VersionReader(run_dir))
    before = {name: value.detach().clone() for name, value in learner.module.named_parameters()}
    figures = learner.learn([member for group in batch.groups for member in group.members], trainer_version=0)
    assert math.isfinite(figures["gradient_norm"])
    assert figures["gradient_norm"] > 0.0
    assert figures["trajectory/delivered_fraction"] == 1.0
    assert any(not torch.equal(value, before[name]) for name, value in learner.module.named_parameters())
