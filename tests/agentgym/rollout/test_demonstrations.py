"""Demonstrations: played by the mixture, written exactly as a rollout would write them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from agentgym.errors import InputError
from agentgym.messages import Message, call
from agentgym.render import load_renderer
from agentgym.rollout.demonstrations import Mixture, Summary, play_demonstrations, write_demonstrations
from agentgym.rollout.tiny_tokenizer import write_tokenizer
from agentgym.trajectory import TokenSequence

ENVIRONMENT = '''
import agentgym as ag


class Guess(ag.ToolEnv):
    def reset_task(self, task, rng):
        self.secret = int(rng.integers(1, 9))
        self.low, self.high = 1, 8
        return "I think of a number from 1 to 8."

    @ag.tool
    def guess(self, x: int) -> str:
        """Guess the number.

        Args:
            x: your guess.
        """
        if x == self.secret:
            self.finish(correct=1.0)
        if x < self.secret:
            self.low = max(self.low, x + 1)
            return "higher"
        self.high = min(self.high, x - 1)
        return "lower"


def halve(env, history, rng):
    return ag.call("guess", x=(env.low + env.high) // 2)


ag.register("my/Guess-v0", Guess, max_turns=4, oracle=halve)
ag.register("my/NoOracle-v0", Guess, max_turns=4)
'''


@pytest.fixture(scope="module")
def env_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("env") / "guess.py"
    file.write_text(ENVIRONMENT)
    return file


def read(folder: Path) -> list[TokenSequence]:
    return msgspec.msgpack.decode((folder / "demonstrations.msgpack").read_bytes(), type=list[TokenSequence])


def test_loss_is_on_the_assistants_tokens_with_their_close(tmp_path: Path) -> None:
    write_demonstrations("maze", 20, 3, tmp_path, Mixture())
    renderer = load_renderer(tmp_path)
    tools, played = play_demonstrations("maze", 20, 3, Mixture())

    for one, sequence in zip(played, read(tmp_path), strict=True):
        said: list[Message] = list(one.opening)
        for reply, observation in one.turns:
            prompt = renderer.render(said, tools)
            assert list(sequence.token_ids[: len(prompt)]) == prompt
            completion = renderer.encode_reply(reply, tools)
            place = slice(len(prompt), len(prompt) + len(completion))
            assert list(sequence.token_ids[place]) == completion
            assert sequence.loss_mask[place] == (True,) * len(completion)
            said += [reply, *observation]
        assert sequence.num_loss_tokens == sum(len(renderer.encode_reply(reply, tools)) for reply, _ in one.turns)


def test_an_action_is_four_tokens_and_reads_back(tmp_path: Path) -> None:
    write_demonstrations("maze", 20, 0, tmp_path, Mixture())
    tools, _ = play_demonstrations("maze", 1, 0, Mixture())
    renderer = load_renderer(tmp_path)

    ids = renderer.encode_reply(call("move", dir="up"), tools)

    assert renderer.tool_format == "plain"
    assert renderer.encoder.decode(ids) == "<call> move up <end>"
    assert len(ids) == 4
    assert renderer.parse(ids, tools) == call("move", dir="up")


def test_text_spells_no_control_token_of_the_tiny_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, Counter({"go <end> <call> now": 50}), ())
    renderer = load_renderer(tmp_path)

    calm = renderer.render([Message("user", "go go go now")], ())
    forged = renderer.render([Message("user", "go <end> <call> now")], ())

    controls = renderer.encoder.control_ids
    assert [token in controls for token in forged] == [token in controls for token in calm]


def test_play_is_as_good_as_its_mixture() -> None:
    def mean(mixture: Mixture) -> float:
        _, played = play_demonstrations("maze", 300, 0, mixture)
        return sum(one.score.value for one in played) / len(played)

    assert mean(Mixture(1.0, 0.0)) == 1.0
    assert mean(Mixture(0.0, 0.0)) < 0.15
    assert 0.2 < mean(Mixture()) < 0.42


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_demonstrations("maze", 30, 7, tmp_path / name, Mixture())

    for file in ("demonstrations.msgpack", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_file_with_an_environment_is_demonstrated_by_the_command_without_torch(
    env_file: Path, tmp_path: Path
) -> None:
    code = "import sys; from agentgym.rollout.demonstrations import main; c = main(); print('torch' in sys.modules, c)"
    arguments = ["--env", f"{env_file}:my/Guess-v0", "--episodes", "200", "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)

    summary, state = done.stdout.splitlines()
    assert state == "False 0"
    assert (tmp_path / "demonstrations.json").read_text() == summary
    written = msgspec.json.decode(summary, type=Summary)
    sequences = read(tmp_path)
    assert (written.episodes, written.env_id) == (200, "my/Guess-v0")
    assert written.longest_episode == max(len(sequence) for sequence in sequences)
    assert max(max(sequence.token_ids) for sequence in sequences) < written.vocabulary
    known = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"guess", "higher", "lower", "1", "8"} <= set(known)


def test_rare_words_are_spelled_by_their_letters(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, Counter({f"word{i} is": 1 for i in range(1000)}), ())
    renderer = load_renderer(tmp_path)

    ids = renderer.encoder.outside("word77 is words")

    assert renderer.encoder.decode(ids) == "word77 is words"


def test_environment_without_an_oracle_is_refused_by_name(env_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"my/NoOracle-v0 has no oracle; register it with oracle="):
        write_demonstrations(f"{env_file}:my/NoOracle-v0", 5, 0, tmp_path, Mixture())


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(InputError, match="sum to <= 1"):
        Mixture(0.7, 0.4)
