"""Each fault of a real engine is told from the others, by forwards of the trainer's own model over the same tokens."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from faulty_engine import FaultyEngine
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from agentgym.errors import VersionError
from agentgym.trajectory import NO_VERSION, TokenSequence
from agentgym_trainer.alarm import examine
from agentgym_trainer.diagnosis import (
    Compared,
    Diagnosis,
    Mismatch,
    Probe,
    diagnose,
    fit_temperatures,
    logprobs_at,
    rows_with_onset,
)
from agentgym_trainer.probes import Target, bf16_head, choose_targets, kept_spans, turns_of
from agentgym_trainer.publish import as_published, published_weights

VOCABULARY = 53
OLD, NEW = 1, 2
FLOOR = 1e-4
SAMPLED = 24


class Dictionary:
    """A version source of two versions."""

    def __init__(self, **models: nn.Module) -> None:
        self._weights = {int(name[1:]): published_weights(model) for name, model in models.items()}

    def read(self, version: int) -> Mapping[str, np.ndarray]:
        if version not in self._weights:
            raise VersionError(f"version {version} is not here")
        return self._weights[version]


@pytest.fixture(scope="module")
def new() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def old(new: LlamaForCausalLM) -> LlamaForCausalLM:
    other, generator = copy.deepcopy(new), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, n).tolist() for n in (5, 20, 33, 40, 17, 24, 60, 9)]


@pytest.fixture(scope="module")
def verdict(new: LlamaForCausalLM, old: LlamaForCausalLM) -> Callable[..., Diagnosis]:
    """What the trainer, which holds `new` as version 2 and can read `old` as version 1, says of rows."""

    def of(rows: Sequence[TokenSequence], temperature: float = 1.0) -> Diagnosis:
        found = examine(new, rows, NEW, temperature, Dictionary(v1=old, v2=new), FLOOR)
        assert found is not None
        return found

    return of


def explained(diagnosis: Diagnosis, cause: str) -> float:
    return max(finding.explained for finding in diagnosis.findings if finding.cause == cause)


def test_an_engine_without_a_fault_is_not_accused(new, prompts, verdict) -> None:
    engine = FaultyEngine(lambda t: (new, NEW))
    found = verdict([engine.play(prompt, SAMPLED) for prompt in prompts])
    assert found.cause is None
    assert found.mismatch.num_tokens == len(prompts) * SAMPLED
    assert found.mismatch.max_abs < 1e-4
    assert str(found).startswith("engine and trainer agree")


@pytest.mark.parametrize(
    ("samples_at", "records_at", "scored_at", "cause", "says"),
    [
        (0.7, 0.7, 1.0, "temperature", "the record is of temperature 0.7"),
        (1.5, 1.5, 0.7, "temperature", "the record is of temperature 1.5"),
        (1.0, 1.0, 0.7, "temperature", "the record is of temperature 1,"),  # the trainer alone is at 0.7
        (0.7, 1.0, 0.7, "raw_logprobs", "logprobs of the raw distribution"),  # the same record; the tokens differ
        (1.6, 1.0, 1.6, "raw_logprobs", "logprobs of the raw distribution"),
    ],
)
def test_raw_logprobs_are_told_from_another_temperature(
    new, prompts, verdict, samples_at, records_at, scored_at, cause, says
) -> None:
    engine = FaultyEngine(lambda t: (new, NEW), samples_at, records_at)
    found = verdict([engine.play(prompt, 2 * SAMPLED) for prompt in prompts], scored_at)
    assert found.cause == cause
    assert says in found.detail
    assert explained(found, cause) > 0.99


def test_weights_of_the_version_before(new, old, prompts, verdict) -> None:
    found = verdict([FaultyEngine(lambda t: (old, NEW)).play(prompt, SAMPLED) for prompt in prompts])
    assert found.cause == "wrong_version"
    assert "with version 1, not with version 2" in found.detail
    assert explained(found, "wrong_version") > 0.99
    assert explained(found, "stale_prefix_cache") < 0.7  # it is not only the keys


@pytest.mark.parametrize("block", [1, 16])
def test_a_prefix_cache_that_outlived_a_publication(new, old, prompts, verdict, block) -> None:
    def play(prompt: list[int]) -> TokenSequence:
        cached = (len(prompt) - 1) // block * block
        return FaultyEngine(lambda t: (new, NEW)).play(prompt, SAMPLED, keys_of=lambda t: old if t < cached else new)

    found = verdict([play(prompt) for prompt in prompts])
    assert found.cause == "stale_prefix_cache"
    assert f"blocks of {block};" in found.detail
    assert explained(found, "stale_prefix_cache") > 0.99
    assert explained(found, "wrong_version") < 0.5


def test_keys_that_were_kept_over_a_publication(new, old, prompts, verdict) -> None:
    def play(prompt: list[int]) -> TokenSequence:
        engine = FaultyEngine(lambda t: (old, OLD) if t < len(prompt) + 9 else (new, NEW))
        return engine.play(prompt, SAMPLED)

    rows = [play(prompt) for prompt in prompts]
    found = verdict(rows)
    assert found.cause == "stale_kv"
    assert explained(found, "stale_kv") > 0.99
    stale = sum(k < v for row in rows for k, v in zip(row.kv_versions, row.policy_versions))
    assert f"8 replies went on with keys of before a publication; the engine says so of {stale} tokens" in found.detail
    assert stale == found.mismatch.num_tokens
    silent = verdict([dataclasses.replace(row, kv_versions=row.policy_versions) for row in rows])
    assert silent.cause == "stale_kv"  # told from the logprobs, not from what the engine says
    assert "says so of 0 tokens" in silent.detail


def test_a_token_is_too_few_for_a_temperature(new, old, verdict) -> None:
    """One that is fitted to it explains all of it, and would be named first."""
    engine = FaultyEngine(lambda t: (old, OLD) if t < 14 else (new, NEW))
    found = verdict([engine.play([7, 5, 3, 11, 19], 11)])
    assert found.mismatch.num_tokens == 1
    assert found.cause == "stale_kv"


def test_the_version_that_is_off_is_examined_not_the_newest(new, old, prompts, verdict) -> None:
    """Its newest tokens may be few, and right: the alarm was not about those."""
    fine = FaultyEngine(lambda t: (new, NEW)).play(prompts[0], 3)
    wrong = [FaultyEngine(lambda t: (new, OLD)).play(prompt, SAMPLED) for prompt in prompts]
    found = verdict([fine, *wrong])
    assert found.mismatch.num_tokens == len(prompts) * SAMPLED
    assert found.cause is not None


def test_a_publication_that_prefills_again_is_no_fault(new, old, prompts, verdict) -> None:
    rows = []
    for prompt in prompts:
        before = FaultyEngine(lambda t: (old, OLD)).play(prompt, 9)
        after = FaultyEngine(lambda t: (new, NEW)).play(before.token_ids, SAMPLED)
        split = len(before)
        rows.append(
            TokenSequence(
                after.token_ids,
                *(
                    tuple(getattr(before, name)) + tuple(getattr(after, name)[split:])
                    for name in ("loss_mask", "behavior_logprobs", "policy_versions", "kv_versions")
                ),
            )
        )
    found = verdict(rows)
    assert found.cause is None
    assert found.mismatch.num_tokens == len(prompts) * SAMPLED
    assert explained(found, "stale_kv") < 0


def test_what_is_rounded_to_bfloat16(new, prompts, verdict) -> None:
    rounded = copy.deepcopy(new)
    with as_published(rounded, "bfloat16"):
        found = verdict([FaultyEngine(lambda t: (rounded, NEW)).play(prompt, SAMPLED) for prompt in prompts])
    assert found.cause == "bf16_weights"
    assert explained(found, "bf16_weights") > 0.99
    assert explained(found, "bf16_head") < 0.5
    with bf16_head(rounded):
        found = verdict([FaultyEngine(lambda t: (rounded, NEW)).play(prompt, SAMPLED) for prompt in prompts])
    assert found.cause == "bf16_head"
    assert explained(found, "bf16_head") > 0.95  # a sum in another order falls on the other side of a rounding
    assert explained(found, "bf16_weights") < 0.5
    rounded.to(torch.bfloat16)
    found = verdict([FaultyEngine(lambda t: (rounded, NEW)).play(prompt, SAMPLED) for prompt in prompts])
    assert found.cause == "bf16_compute"
    assert "everything in bfloat16" in found.detail


def test_a_context_that_the_engine_did_not_read(new, prompts, verdict) -> None:
    rows = [FaultyEngine(lambda t: (new, NEW)).play(prompt, SAMPLED) for prompt in prompts]

    def with_another_token(row: TokenSequence) -> TokenSequence:
        place = row.loss_mask.index(True) + 8
        ids = list(row.token_ids)
        ids[place] = (ids[place] + 7) % VOCABULARY
        return dataclasses.replace(row, token_ids=tuple(ids))

    found = verdict([with_another_token(row) for row in rows])
    assert found.cause == "context_drift"
    assert "8 of 8 rows agree up to a token and not from there on" in found.detail


def test_a_first_token_that_only_the_engine_reads(new, prompts, verdict) -> None:
    first = new.config.bos_token_id
    rows = []
    for prompt in prompts:
        row = FaultyEngine(lambda t: (new, NEW)).play([first, *prompt], SAMPLED)
        fields = (getattr(row, field.name)[1:] for field in dataclasses.fields(row))
        rows.append(TokenSequence(*fields))
    found = verdict(rows)
    assert found.cause == "context_drift"
    assert f"begin with token {first}" in found.detail


def test_noise_is_not_given_a_name(new, prompts, verdict) -> None:
    rng = np.random.default_rng(3)
    rows = []
    for prompt in prompts:
        row = FaultyEngine(lambda t: (new, NEW)).play(prompt, SAMPLED)
        noisy = tuple(
            logprob + rng.normal() * 0.1 if mask else 0.0 for logprob, mask in zip(row.behavior_logprobs, row.loss_mask)
        )
        rows.append(dataclasses.replace(row, behavior_logprobs=noisy))
    found = verdict(rows)
    assert found.cause == "unexplained"
    assert all(finding.explained < 0.5 for finding in found.findings)


def test_the_trainers_model_is_as_it_was(new, prompts, verdict) -> None:
    new.train()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    verdict([FaultyEngine(lambda t: (new, NEW), 0.7, 1.0).play(prompts[0], SAMPLED)])
    assert new.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in new.modules())
    assert all(parameter.requires_grad for parameter in new.parameters())
    new.eval()


# --------------------------------------------------------------------------------------------------- the pure parts


def test_mismatch_is_its_definition() -> None:
    found = Mismatch.of(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0]))
    assert found.num_tokens == 3
    assert found.mean_abs == pytest.approx(0.5)
    assert found.max_abs == pytest.approx(1.0)
    assert found.excess == pytest.approx((np.exp(0.5) + 1 + np.exp(1.0)) / 3 - 1)
    assert Mismatch.of(torch.empty(0), torch.empty(0)) == Mismatch(0, 0.0, 0.0, 0.0)


def test_explained_is_the_part_of_the_mismatch_that_a_prediction_takes_away() -> None:
    compared = Compared(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5]), torch.tensor([0, 0]))
    found = diagnose(compared, [Probe("bf16_head", torch.tensor([-1.0, -2.1]), "this"),
                                Probe("wrong_version", torch.tensor([-2.0, -3.0]), "that")], 0.01)  # fmt: skip
    assert [(f.cause, round(f.explained, 6)) for f in found.findings] == [("bf16_head", 0.9), ("wrong_version", -1.0)]
    assert found.findings[0].left == pytest.approx(0.05)
    assert found.cause == "bf16_head"
    assert "it explains 90.0% and leaves 0.05" in str(found)


@pytest.mark.parametrize(("off", "cause"), [(0.26, "unexplained"), (0.24, "bf16_head")])
def test_a_cause_must_explain_half(off: float, cause: str) -> None:
    compared = Compared(torch.zeros(4), torch.full((4,), 0.5), torch.tensor([0, 0, 1, 1]))
    assert diagnose(compared, [Probe("bf16_head", torch.full((4,), off), "")], 0.01).cause == cause


def test_of_equal_evidence_the_simpler_cause_is_named() -> None:
    compared = Compared(torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    probes = [Probe("bf16_compute", torch.full((2,), 0.01), ""), Probe("bf16_weights", torch.full((2,), 0.02), "")]
    assert diagnose(compared, probes, 0.01).cause == "bf16_weights"
    probes[1] = Probe("bf16_weights", torch.full((2,), 0.05), "")
    assert diagnose(compared, probes, 0.01).cause == "bf16_compute"


@pytest.mark.parametrize(
    ("size", "shift", "cause"),
    [(1.0, 0, "bf16_compute"), (1.9, 0, "bf16_compute"), (2.2, 0, "unexplained"), (0.45, 0, "unexplained"),
     (1.0, 37, "unexplained")],
)  # fmt: skip
def test_rounding_in_another_order_is_told_by_its_size_and_its_tokens(size: float, shift: int, cause: str) -> None:
    """The prediction has the right size at the right tokens and the wrong sign at half of them."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.01 * torch.rand(200, generator=generator) ** 3
    signs = torch.rand(2, 200, generator=generator).round() * 2 - 1
    scored = -torch.rand(200, generator=generator) - 1
    recorded = scored + size * signs[0] * scale.roll(shift)
    compared = Compared(recorded, scored, torch.arange(200) // 20)
    probes = [
        Probe("bf16_head", scored + signs[1] * scale, "not this: it is predicted bit for bit"),
        Probe("bf16_compute", scored + signs[1] * scale, "everything in bfloat16"),
    ]
    assert diagnose(compared, probes[:1], FLOOR).cause == "unexplained"
    found = diagnose(compared, probes, FLOOR)
    assert found.cause == cause
    if cause == "bf16_compute":
        assert f"added in another order: the differences are {size:.2g} times" in found.detail


def test_a_floor_is_a_floor() -> None:
    compared = Compared(torch.zeros(2), torch.full((2,), 0.01), torch.zeros(2, dtype=torch.int64))
    excess = compared.mismatch.excess
    assert diagnose(compared, [], excess * 1.01).cause is None
    assert diagnose(compared, [], excess * 0.99).cause == "unexplained"
    broken = Compared(torch.zeros(2), torch.tensor([0.0, float("nan")]), torch.zeros(2, dtype=torch.int64))
    assert diagnose(broken, [], 1.0).cause is not None


def test_the_temperatures_of_record_and_draw() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 2.0 * torch.randn(4000, 12, generator=generator)
    for drawn, recorded in ((0.5, 0.5), (2.0, 1.0), (1.0, 0.8)):
        tokens = torch.multinomial((logits / drawn).softmax(-1), 1, generator=generator)[:, 0]
        fit = fit_temperatures(logits, tokens, logprobs_at(logits, tokens, recorded))
        assert fit.recorded == pytest.approx(recorded, rel=1e-4)
        assert abs(1 / fit.sampled - 1 / drawn) < 4 * fit.inverse_error
        assert fit.inverse_error < 0.05
    flat = fit_temperatures(torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 1]), torch.full((5,), -1.0986))
    assert flat.inverse_error == float("inf")  # tokens of flat distributions say nothing


def test_onset_is_a_change_within_a_row() -> None:
    clean, off = [1e-6] * 10, [0.3] * 10
    rows = torch.tensor([0] * 20 + [1] * 20 + [2] * 20)

    def compared(values: Sequence[float]) -> Compared:
        return Compared(torch.zeros(60), torch.tensor(values), rows)

    assert rows_with_onset(compared(clean + off + clean + off + clean + clean)) == (2, 2)
    assert rows_with_onset(compared(off + off + off + off + clean + clean)) == (0, 2)
    assert rows_with_onset(compared([*clean, *off[:3], *clean[:7], *off, *off, *clean, *clean])) == (0, 2)


def row_of(mask: str, versions: str) -> TokenSequence:
    """`mask` of . and x, `versions` of digits."""
    labels = tuple(int(v) if m == "x" else NO_VERSION for m, v in zip(mask, versions))
    loss = tuple(m == "x" for m in mask)
    return TokenSequence(tuple(range(len(mask))), loss, (-0.5,) * len(mask), labels, labels)


def test_spans_of_kept_keys() -> None:
    #             0123456789
    row = row_of("..xxx..xx.", "..112..22.")
    # token 3 was sampled by 1 and goes through 2's weights, which sample token 4
    assert kept_spans(row, 2, 4) == [(1, 0, 3), (2, 3, 4)]
    assert kept_spans(row, 2, 3) == [(1, 0, 3)]
    assert kept_spans(row, 7, 8) == [(2, 0, 8)]  # the next turn is prefilled whole
    assert kept_spans(row_of(".xxxxx", ".11335"), 1, 5) == [(1, 0, 2), (3, 2, 4), (5, 4, 5)]


def test_turns_and_targets() -> None:
    row = row_of("..xxx..xx.", "..112..22.")
    assert list(turns_of(Target(row, (4, 7, 8)))) == [(2, (4,)), (7, (7, 8))]
    broken = dataclasses.replace(row, behavior_logprobs=(*row.behavior_logprobs[:8], float("-inf"), 0.0))
    assert [target.positions for target in choose_targets([broken, row], 2, 50)] == [(4, 7), (4, 7, 8)]
    assert choose_targets([row], 7, 50) == []
    long = row_of("." + "x" * 900, "." + "2" * 900)
    assert [len(target.positions) for target in choose_targets([long] * 9, 2, 50)] == [900, 900, 248]
    assert [len(target.positions) for target in choose_targets([long] * 9, 2, 2**17)] == [128]
    rows = [dataclasses.replace(row, token_ids=(number, *row.token_ids[1:])) for number in range(480)]
    assert [target.row.token_ids[0] for target in choose_targets(rows, 2, 50)] == list(range(0, 480, 10))


def test_bf16_head_leaves_the_layer_as_it_was(new) -> None:
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = new(input_ids=ids).logits
        with contextlib.suppress(KeyError), bf16_head(new):
            rounded = new(input_ids=ids).logits
            raise KeyError
        assert torch.equal(new(input_ids=ids).logits, plain)
    assert not torch.equal(rounded, plain)
    assert torch.equal(rounded, rounded.to(torch.bfloat16).float())
