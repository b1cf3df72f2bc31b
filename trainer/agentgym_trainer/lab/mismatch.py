"""The mismatch lab: an engine against the trainer's forward, on the same tokens. Must never know how an engine works.

Law: one thing is varied at a time. Each phase samples tokens under conditions of its own (a temperature, prompts seen
before, a publication while sampling, prompts seen before a publication), and everything that is said of a phase is a
comparison of what the engine recorded with a forward of the trainer's model: as it is, and as each known fault would
have made it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from agentgym.errors import InputError, ServiceError, VersionError
from agentgym.trajectory import TokenSequence
from agentgym_trainer.diagnosis import Diagnosis, Mismatch, diagnose
from agentgym_trainer.lab.mismatch_engines import LabEngine, ServedEngine
from agentgym_trainer.probes import Prober, choose_targets
from agentgym_trainer.publish import published_weights

PERTURBATION = 0.02  # of each tensor's standard deviation, for the weights that are published
_RANDOM_PROMPT = 160  # tokens of the longest, where no environment is at hand
_SHORT_REPLY = 16
_PUBLICATIONS = 5  # tried, until one meets a reply under way
_CROWD = 4
CONVERSATION = ({"role": "user", "content": "Say  one word.\n"}, {"role": "assistant", "content": " Two words. "},
                {"role": "user", "content": "And now?"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Questions:
    """What the lab asks of an engine.

    Example: `Questions(temperatures=(1.0, 0.7), num_prompts=16, num_tokens=48, context=1024)`.
    """

    temperatures: tuple[float, ...] = (1.0, 0.7)
    num_prompts: int = 16
    num_tokens: int = 48
    context: int = 1024  # tokens of a prompt and its replies
    seed: int = 0
    score_at: float | None = None  # the trainer's temperature; None: the one that is asked of the engine


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison of a phase's tokens: with the trainer's forward in some form.

    Example: `Line("as the trainer scores it", Mismatch(768, 4e-6, 2e-5, 4e-6))`.
    """

    forward: str
    mismatch: Mismatch


@dataclass(frozen=True, slots=True)
class Phase:
    """Tokens sampled under one condition, their comparisons, and the diagnosis. The first line is the trainer's own.

    Example: `Phase("temperature 1", (Line(...), ...), Diagnosis(None, ...))`.
    """

    name: str
    lines: tuple[Line, ...]
    diagnosis: Diagnosis


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """Whether both sides make the same prompt ids of a conversation. `first_difference` is None where they do.

    Example: `TemplateCheck(num_engine=14, num_trainer=13, first_difference=9, engine="<bos>", trainer="\\n")`.
    """

    num_engine: int
    num_trainer: int
    first_difference: int | None
    engine: str  # the text of the token there
    trainer: str


@dataclass(frozen=True, slots=True)
class Result:
    """What the lab found. `template` is None where the engine's side renders no conversations."""

    engine: str
    model: str
    floor: float
    phases: tuple[Phase, ...]
    template: TemplateCheck | None
    retokenised: tuple[int, int] = field(default=(0, 0))  # replies that encode to other ids again, of how many

    @property
    def worst(self) -> Phase:
        """The phase that is furthest off among those with a named cause; without one, furthest of all."""
        return max(
            self.phases, key=lambda phase: (phase.diagnosis.cause is not None, phase.diagnosis.mismatch.mean_abs)
        )


def run_mismatch(
    engine: LabEngine, folder: Path, questions: Questions, floor: float, previous: Sequence[Path] = (),
    publishes: bool = True, report: Callable[[str], None] = print,
) -> Result:  # fmt: skip
    """Compares `engine` with the model in `folder`; `previous` are models that the engine may still have. Weights are
    published (`publishes`) only to an engine that was started for this."""
    lab = _Lab(engine, folder, questions, floor, previous)
    phases = tuple(lab.phases(publishes, report))
    return Result(engine.name, str(folder), floor, phases, lab.template(), lab.retokenised())


class _Lab:
    def __init__(
        self, engine: LabEngine, folder: Path, questions: Questions, floor: float, previous: Sequence[Path]
    ) -> None:
        self._engine = engine
        self._folder = folder
        self._questions = questions
        self._floor = floor
        self._model = load_reference(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._weights: dict[int, Mapping[str, np.ndarray]] = {0: published_weights(self._model)}
        self._names = {0: "the weights of the model's folder"}
        for number, other in enumerate(previous, start=1):
            self._weights[-number] = published_weights(load_reference(other))
            self._names[-number] = str(other)
        self._sampled: list[TokenSequence] = []
        self._episodes = engine.episodes() if isinstance(engine, ServedEngine) else []
        self._prompts = prompts_of(self._episodes, questions) or self._random_prompts()

    def _random_prompts(self) -> list[list[int]]:
        rng, questions = np.random.default_rng(self._questions.seed), self._questions
        longest = min(questions.context - questions.num_tokens, _RANDOM_PROMPT)
        lengths = rng.integers(min(4, longest), longest + 1, questions.num_prompts)
        return [rng.integers(0, int(self._model.config.vocab_size), length).tolist() for length in lengths]

    def read(self, version: int) -> Mapping[str, np.ndarray]:
        """As VersionSource.read."""
        if version not in self._weights:
            raise VersionError(f"the lab has no version {version}")
        return self._weights[version]

    # ------------------------------------------------------------------------------------------------------ phases

    def phases(self, publishes: bool, report: Callable[[str], None]) -> Iterator[Phase]:
        older = tuple(sorted((version for version in self._weights if version < 0), reverse=True))
        if self._episodes:
            yield self._phase("episodes of the environment", self._episodes, 0, 1.0, older)
        for temperature in self._questions.temperatures:
            report(f"sampling at temperature {temperature:g}")
            rows = self._sample(temperature)
            self._sampled += rows
            yield self._phase(f"temperature {temperature:g}", rows, 0, temperature, older)
        report("sampling from prompts that the engine has seen")
        yield self._phase("prompts seen before", self._sample(1.0), 0, 1.0, older)
        if not (publishes and isinstance(self._engine, ServedEngine)):
            return
        report("publishing other weights while it samples")
        changed = perturbed(self._weights[0], self._questions.seed)
        before, version, rows = self._through_publication(self._engine, changed)
        self._weights[before] = self._weights[0]
        self._weights[version], self._names[version] = changed, "the weights published while it sampled"
        yield self._phase("before a publication", rows, before, 1.0, older)
        yield self._phase("behind it, in the same replies", rows, version, 1.0, (0,))
        report("sampling from the same prompts under the new weights")
        yield self._phase("prompts seen before it", self._sample(1.0), version, 1.0, (0,))

    def _sample(self, temperature: float) -> list[TokenSequence]:
        questions = self._questions
        return self._engine.sample(self._prompts, questions.num_tokens, temperature, questions.seed)

    def _through_publication(
        self, engine: ServedEngine, changed: Mapping[str, np.ndarray]
    ) -> tuple[int, int, list[TokenSequence]]:
        """The version before, the one behind, and rows that have tokens of both. Where no reply was under way at the
        publication, the first weights come back, and it is tried again."""
        questions = self._questions
        mean_reply = np.mean([sum(row.loss_mask) for row in self._sampled])
        crowd = self._prompts * (_CROWD if mean_reply < _SHORT_REPLY else 1)  # of short replies, more are under way
        before = 0
        for _ in range(_PUBLICATIONS):
            version, rows = engine.sample_through_publication(crowd, questions.num_tokens, questions.seed, changed)
            if rows:
                return before, version, rows
            before = engine.publish(self._weights[0])
        raise ServiceError(
            f"no reply was under way at any of {_PUBLICATIONS} publications; ask for more prompts or longer replies"
        )

    def _phase(
        self, name: str, rows: Sequence[TokenSequence], version: int, asked: float, older: Sequence[int]
    ) -> Phase:
        scored_at = self._questions.score_at or asked
        model = self._holding(version)
        targets = choose_targets(rows, version, int(self._model.config.vocab_size))
        if not targets:
            return Phase(name, (Line("as the trainer scores it", Mismatch(0, 0.0, 0.0, 0.0)),), _nothing())
        prober = Prober(model, targets, version, scored_at, self, older, self._names)
        compared = prober.compared()
        probes = prober.probes(compared)
        lines = [Line(f"as the trainer scores it, at {scored_at:g}", compared.mismatch)]
        if scored_at != 1.0:
            raw = prober.logprobs_at(1.0)
            lines.append(Line("raw: at 1", Mismatch.of(raw, compared.recorded)))
        lines += [
            Line(f"{probe.cause}: {probe.detail}", Mismatch.of(probe.predicted, compared.recorded)) for probe in probes
        ]
        stale = torch.tensor([t.row.kv_versions[p] < t.row.policy_versions[p] for t in targets for p in t.positions])
        if stale.any():
            for label, chosen in (("older keys", stale), ("keys of its version", ~stale)):
                found = Mismatch.of(compared.scored[chosen], compared.recorded[chosen])
                lines.append(Line(f"tokens that the engine says attend to {label}", found))
        return Phase(name, tuple(lines), diagnose(compared, probes, self._floor))

    def _holding(self, version: int) -> PreTrainedModel:
        """The reference model with the weights of `version`."""
        state = self._model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, array in self._weights[version].items():
                state[name].copy_(torch.from_numpy(array))
        return self._model

    # ------------------------------------------------------------------------------------------------------- tokens

    def template(self) -> TemplateCheck | None:
        """Both sides' prompt ids of one conversation, with the white space that templates and encoders stumble on."""
        theirs = self._engine.chat_ids(CONVERSATION)
        if theirs is None or self._tokenizer.chat_template is None:
            return None
        ours = self._tokenizer.apply_chat_template(
            list(CONVERSATION), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        pairs = itertools.zip_longest(theirs, ours)
        place = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
        if place is None:
            return TemplateCheck(len(theirs), len(ours), None, "", "")
        return TemplateCheck(len(theirs), len(ours), place, self._text(theirs, place), self._text(ours, place))

    def retokenised(self) -> tuple[int, int]:
        """Replies whose text encodes to other ids: what a side that handles text would lose."""
        replies = [[t for t, mask in zip(row.token_ids, row.loss_mask) if mask] for row in self._sampled]
        texts = [self._tokenizer.decode(reply) for reply in replies]
        again = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return sum(one != other for one, other in zip(replies, again)), len(replies)

    def _text(self, ids: Sequence[int], place: int) -> str:
        return repr(self._tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "(the end)"


def prompts_of(episodes: Sequence[TokenSequence], questions: Questions) -> list[list[int]]:
    """What the engine was asked in episodes, turn by turn, spread over all of them; [] if nothing leaves room for a
    reply."""
    found = [
        row.token_ids[:t]
        for row in episodes
        for t, mask in enumerate(row.loss_mask)
        if mask and not row.loss_mask[t - 1] and t + questions.num_tokens <= questions.context
    ]
    prompts = sorted(set(found), key=lambda prompt: (len(prompt), prompt))
    chosen = np.linspace(0, len(prompts) - 1, min(questions.num_prompts, len(prompts))).astype(int)
    return [list(prompts[index]) for index in chosen]


def load_reference(folder: Path) -> PreTrainedModel:
    """The model as the trainer computes it: fp32, without dropout. Raises InputError."""
    disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} does not hold a causal language model: {error}") from error


def perturbed(weights: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Other weights, PERTURBATION standard deviations away: far enough that keys of the old ones are seen."""
    rng = np.random.default_rng(seed)
    changed = {}
    for name, array in weights.items():
        noise = rng.standard_normal(array.shape, dtype=np.float32)
        changed[name] = (array + PERTURBATION * array.std() * noise).astype(array.dtype)
    return changed


def _nothing() -> Diagnosis:
    return Diagnosis(None, "no token", Mismatch(0, 0.0, 0.0, 0.0), ())
