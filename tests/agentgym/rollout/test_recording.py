"""A conversation recorded from outside: history that a client echoes is matched to the ids that were sampled.

Replies are sampled in a spelling that no tokenizer writes (one token a byte), so that any id that came from encoding
their text instead of from the record shows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.policy import Completion
from agentgym.render import ChatTemplateRenderer, load_renderer
from agentgym.rollout.recording import Link, RecordedPrompt, Recording
from agentgym.trajectory import EpisodeStatus, Trajectory, to_sequences

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL = ToolSpec("run", "Runs a command.", {"type": "object", "properties": {"command": {"type": "string"}}})
OTHER = ToolSpec("look", "Looks.", {"type": "object", "properties": {}})
WORDS = ("tick", "tock", "the then", 'say "so"', "漢 字", "{}", "")
calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
quick = settings(max_examples=60, deadline=None, suppress_health_check=calm)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplateRenderer:
    folder = tmp_path_factory.mktemp("merging")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = [" ".join(WORDS), "tool_call name arguments command run assistant user"] * 20
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))  # type: ignore[call-arg]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return load_renderer(Path(folder))


def spelled(renderer: ChatTemplateRenderer, text: str) -> list[int]:
    """`text` byte by byte, as only a policy would write it."""
    letters = {chr(code): renderer.encoder.token_id(chr(code)) for code in range(0x21, 0x7F)}
    ids: list[int] = []
    for letter in text:
        known = letters.get(letter)
        ids += renderer.encoder.outside(letter) if known is None else [known]
    return ids


@dataclass
class Agent:
    """An agent outside with its history, which it sends whole each time, and the record on the other side."""

    renderer: ChatTemplateRenderer
    recording: Recording
    messages: list[Message]
    tools: tuple[ToolSpec, ...] = (TOOL,)
    sampled: list[tuple[int, ...]] = field(default_factory=list)
    calls: int = 0

    def ask(self, text: str, call: dict[str, object] | None = None, cut: bool = False) -> RecordedPrompt:
        """One turn: the policy says `text`, and makes `call` where there is one."""
        prompt = self.recording.prompt(self.messages, self.tools)
        said = text if call is None else f"{text}<tool_call>\n{json.dumps(call)}\n</tool_call>"
        ids = spelled(self.renderer, said) + ([] if cut else [self.renderer.stop_token_ids[0]])
        reply = self.renderer.parse(ids, self.tools)
        named = tuple(replace(one, call_id=f"call_u{self.calls}{i}") for i, one in enumerate(reply.tool_calls))
        self.calls += 1
        reply = replace(reply, tool_calls=named)
        self.recording.deliver(self.recording.add(prompt, completion(ids), reply))
        self.sampled.append(tuple(ids))
        self.messages.append(reply)
        return prompt

    def hear(self, text: str) -> None:
        calls = self.messages[-1].tool_calls
        self.messages += [Message("tool", text, (), call.call_id) for call in calls] or [Message("user", text)]


def completion(ids: Sequence[int], version: int = 0) -> Completion:
    return Completion(tuple(ids), (-0.5,) * len(ids), (version,) * len(ids), (version,) * len(ids), "stop")


def rows(recording: Recording):  # type: ignore[no-untyped-def]
    trajectory = Trajectory("t", "g", "e", "k", 0, (), recording.turns(), EpisodeStatus.TERMINATED, None, {}, None)
    return to_sequences(trajectory)


def begin(renderer: ChatTemplateRenderer, text: str = "go") -> Agent:
    return Agent(renderer, Recording(renderer), [Message("system", "the then"), Message("user", text)])


def trained(recording: Recording) -> list[int]:
    return [t for row in rows(recording) for t, loss in zip(row.token_ids, row.loss_mask) if loss]


def contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == tuple(part) for i in range(len(ids) - len(part) + 1))


# ------------------------------------------------------------------------------------------------- echoed history


def echoed(message: Message, rng: random.Random, ids: dict[str, str]) -> Message:
    """What some client makes of a message without meaning anything by it."""
    if message.role == "tool":
        assert message.tool_call_id is not None
        value = message.to_openai() | {"tool_call_id": ids[message.tool_call_id]}
        if rng.random() < 0.5:
            value["content"] = [{"type": "text", "text": message.content}]
        return Message.from_openai(value)
    if message.role != "assistant":
        return Message.from_openai({"role": message.role, "content": [{"type": "text", "text": message.content}]})
    calls = []
    for call in message.tool_calls:
        ids[call.call_id] = f"toolu_{rng.randrange(10**6)}"
        arguments = call.arguments
        if rng.random() < 0.7:
            items = list(json.loads(arguments).items())
            rng.shuffle(items)
            style = {"indent": rng.choice([None, 2]), "separators": rng.choice([(",", ":"), (", ", ": ")])}
            arguments = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5, **style)  # type: ignore[arg-type]
        calls.append(ToolCall(ids[call.call_id], call.name, arguments).to_openai())
    value = {"role": "assistant", "content": message.content or rng.choice([None, ""]), "refusal": None}
    if calls or rng.random() < 0.5:
        value |= {"tool_calls": calls or None, "function_call": None, "annotations": []}
    return Message.from_openai(value)


def echo(messages: Sequence[Message], rng: random.Random) -> list[Message]:
    ids: dict[str, str] = {}
    return [echoed(message, rng, ids) for message in messages]


calls = st.fixed_dictionaries(
    {
        "name": st.just("run"),
        "arguments": st.dictionaries(
            st.sampled_from(["command", "x", "y"]), st.one_of(st.sampled_from(WORDS), st.integers(-5, 5), st.none())
        ),
    }
)
turns = st.lists(
    st.tuples(st.sampled_from(WORDS), st.one_of(st.none(), calls), st.booleans(), st.text(max_size=8)),
    min_size=1,
    max_size=6,
)


@quick
@given(turns=turns, seed=st.integers(0, 2**32))
def test_an_echoed_history_keeps_its_ids_and_stays_one_row(renderer, turns, seed):
    rng = random.Random(seed)
    agent = begin(renderer)
    for text, call, cut, answer in turns:
        before = list(agent.messages)
        prompt = agent.ask(text, call, cut=cut and call is None)
        assert prompt.messages == tuple(before)
        agent.hear(answer)
        agent.messages = echo(agent.messages, rng)
    row, *more = rows(agent.recording)
    assert more == []
    assert agent.recording.links() == (Link.OPENING, *[Link.CONTINUATION] * (len(turns) - 1))
    # what is trained on is what was sampled, id by id, and nothing else
    assert trained(agent.recording) == [token for ids in agent.sampled for token in ids]
    # and the whole row is what turn-by-turn bridging makes of the first prompt
    ids = list(agent.recording.turns()[0].prompt_ids)
    for turn, sampled in zip(agent.recording.turns(), agent.sampled, strict=True):
        assert tuple(ids) == turn.prompt_ids
        ids = [*ids, *sampled] if not turn.observation else renderer.bridge(ids, sampled, turn.observation)
    assert tuple(ids) == row.token_ids


def edit_content(message: Message) -> Message:
    return replace(message, content=message.content + "!")


def edit_arguments(message: Message) -> Message:
    return replace(message, tool_calls=(replace(message.tool_calls[0], arguments='{"command": "other"}'),))


@quick
@given(turns=turns, place=st.integers(0, 5), kind=st.sampled_from(["reply", "arguments", "result", "drop", "system"]))
def test_a_changed_history_forks_and_every_sampled_id_is_trained_once(renderer, turns, place, kind):
    agent = begin(renderer)
    for text, call, _, answer in turns:
        agent.ask(text, call)
        agent.hear(answer)
    before = trained(agent.recording)
    replies = [i for i, m in enumerate(agent.messages) if m.role == "assistant"]
    at = replies[place % len(replies)]
    changed = list(agent.messages)
    if kind == "arguments" and changed[at].tool_calls:
        changed[at] = edit_arguments(changed[at])
    elif kind == "result":
        changed[at + 1] = replace(changed[at + 1], content=changed[at + 1].content + "?")
    elif kind == "system":
        changed[0] = Message("system", "summary so far")
    elif kind == "drop":
        del changed[at : at + 2]
    else:
        changed[at] = edit_content(changed[at])
    agent.messages = changed
    already = len(agent.sampled)
    prompt = agent.ask("tick", None)
    if kind == "drop" and len(replies) == 1:
        assert agent.recording.links()[-1] is Link.BRANCH  # the same opening, sampled again
    elif kind == "result" and at == replies[-1]:
        assert agent.recording.links()[-1] is Link.CONTINUATION  # nobody had continued that reply yet
        assert len(rows(agent.recording)) == 1
        return
    if not (kind in ("reply", "arguments") and len(replies) == 1 and prompt.parent is not None):
        assert len(rows(agent.recording)) == 2
    assert sorted(trained(agent.recording)) == sorted([*before, *agent.sampled[-1]])
    # replies that are still in the history, unedited, stand in the new prompt as they were sampled
    kept = [ids for i, ids in zip(replies, agent.sampled[:already], strict=True) if i != at and kind != "drop"]
    for ids in kept:
        assert contains(prompt.token_ids, ids)


# -------------------------------------------------------------------------------------------- branches, by example


def test_a_result_edited_before_anyone_went_on_is_a_continuation(renderer):
    agent = begin(renderer)
    agent.ask("tick")
    agent.hear("a")
    prompt = agent.recording.prompt([*agent.messages[:-1], Message("user", "b")], agent.tools)
    assert prompt.token_ids[: len(agent.recording.turns()[0].prompt_ids)] == agent.recording.turns()[0].prompt_ids


def test_parallel_agents_in_one_session_are_a_row_each_however_they_interleave(renderer):
    recording = Recording(renderer)
    agents = [Agent(renderer, recording, [Message("user", f"part {i}")]) for i in range(3)]
    for step in range(3):
        for agent in agents:
            agent.ask(f"tick {step}")
            agent.hear("go on")
    assert len(rows(recording)) == 3
    assert sorted(recording.links()) == sorted([Link.OPENING] * 3 + [Link.CONTINUATION] * 6)
    assert len(trained(recording)) == sum(len(ids) for agent in agents for ids in agent.sampled)


def test_two_branches_of_one_reply_share_it_and_train_it_once(renderer):
    agent = begin(renderer)
    agent.ask("tick")
    other = Agent(renderer, agent.recording, [*agent.messages, Message("user", "left")])
    agent.hear("right")
    agent.ask("tock")
    other.ask("tock tock")
    assert agent.recording.links() == (Link.OPENING, Link.CONTINUATION, Link.BRANCH)
    first, second = rows(agent.recording)
    assert first.num_loss_tokens + second.num_loss_tokens == sum(map(len, [*agent.sampled, *other.sampled]))
    assert contains(second.token_ids, agent.sampled[0])  # as context


def test_one_opening_sampled_twice_is_two_turns(renderer):
    agent = begin(renderer)
    again = Agent(renderer, agent.recording, list(agent.messages))
    agent.ask("tick")
    again.ask("tock")
    assert agent.recording.links() == (Link.OPENING, Link.BRANCH)
    again.hear("go on")
    again.ask("tock")
    assert agent.recording.links()[-1] is Link.CONTINUATION
    assert [row.num_loss_tokens for row in rows(agent.recording)] == [
        len(agent.sampled[0]), len(again.sampled[0]) + len(again.sampled[1])
    ]  # fmt: skip


def test_compaction_begins_a_row_in_which_kept_replies_have_their_ids(renderer):
    agent = begin(renderer)
    for text in ("tick", "tock", "the then"):
        agent.ask(text)
        agent.hear("go on")
    agent.messages = [Message("system", "the then"), Message("user", "summary"), *agent.messages[-2:]]
    prompt = agent.ask("tick")
    assert prompt.parent is None
    assert agent.recording.links()[-1] is Link.REWRITE
    assert contains(prompt.token_ids, agent.sampled[2])
    assert not contains(prompt.token_ids, agent.sampled[0])
    text = renderer.encoder.decode(renderer.render(list(prompt.messages), agent.tools))
    assert renderer.encoder.decode(prompt.token_ids) == text


def test_other_tools_are_another_conversation(renderer):
    agent = begin(renderer)
    agent.ask("tick")
    agent.hear("go on")
    agent.tools = (TOOL, OTHER)
    prompt = agent.ask("tock")
    assert agent.recording.links()[-1] is Link.REWRITE
    assert contains(prompt.token_ids, agent.sampled[0])
    assert "Looks." in renderer.encoder.decode(prompt.token_ids)


def test_a_reply_that_the_policy_never_gave_is_context(renderer):
    agent = begin(renderer)
    agent.ask("tick")
    agent.messages += [Message("user", "a"), Message("assistant", "invented"), Message("user", "b")]
    prompt = agent.ask("tock")
    assert agent.recording.links() == (Link.OPENING, Link.REWRITE)
    assert prompt.parent == 0
    (row,) = rows(agent.recording)
    assert trained(agent.recording) == [*agent.sampled[0], *agent.sampled[1]]
    text = renderer.encoder.decode(renderer.render(list(prompt.messages), agent.tools))
    assert renderer.encoder.decode(row.token_ids[: len(prompt.token_ids)]) == text


def test_an_unreadable_call_comes_back_as_the_text_it_was_sent_as(renderer):
    agent = begin(renderer)
    prompt = agent.recording.prompt(agent.messages, agent.tools)
    ids = [*spelled(renderer, 'well <tool_call>{"name": </tool_call>'), renderer.stop_token_ids[0]]
    reply = renderer.parse(ids, agent.tools)
    agent.recording.add(prompt, completion(ids), reply)
    shown = Message("assistant", reply.content + "".join(call.arguments for call in reply.tool_calls))
    after = agent.recording.prompt([*agent.messages, shown, Message("user", "what?")], agent.tools)
    assert after.parent == 0
    assert contains(after.token_ids, ids)


def test_replies_that_reached_nobody_are_no_part_of_the_trajectory(renderer):
    agent = begin(renderer)
    prompt = agent.recording.prompt(agent.messages, agent.tools)
    lost = agent.recording.add(prompt, completion([5, 6]), Message("assistant", "lost"))
    agent.ask("tick")
    assert [turn.completion.token_ids for turn in agent.recording.turns()] == agent.sampled
    assert agent.recording.num_undelivered == 1
    # a client that goes on from it has it after all
    agent.recording.add(
        agent.recording.prompt([*prompt.messages, Message("assistant", "lost"), Message("user", "?")], agent.tools),
        completion([7]), Message("assistant", "x"),
    )  # fmt: skip
    assert lost == 0
    assert (5, 6) in [turn.completion.token_ids for turn in agent.recording.turns()]


def test_long_histories_cost_little(renderer):
    """500 turns, each sent with the whole history: matching is linear in it and encodes the new messages alone."""
    agent = begin(renderer)
    for _ in range(500):
        agent.ask("tick")
        agent.messages.append(Message("user", "on"))
    assert len(rows(agent.recording)) == 1
