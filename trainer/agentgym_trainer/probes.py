"""The same tokens, scored as an engine with a given fault would have recorded them. Must never know what the engine
did record beyond comparing: the verdict is `diagnosis.py`.

Law: every prediction is a forward of the trainer's own model over the very tokens: with values rounded to bfloat16
where the fault rounds them, with the published weights of another version, on keys and values that another version
computed, or at another temperature. Rounded weights and a rounded output layer are predicted bit for bit; a forward
wholly in bfloat16 only nearly, because an engine adds in another order.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentgym.errors import VersionError
from agentgym.trajectory import TokenSequence
from agentgym_trainer.anchors.protocol import VersionSource
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.diagnosis import Compared, Probe, fit_temperatures, logprobs_at
from agentgym_trainer.logprobs import logits_at, unwrap
from agentgym_trainer.publish import as_published

MAX_TOKENS = 2048  # compared
MAX_ROWS = 48  # a fault is in many rows or is no cause; each costs a dozen forwards
MAX_LOGITS = 2**24  # tokens times vocabulary that are held at once: 64 MB
_FITTED = 16  # tokens; a temperature that is fitted to a few explains them whatever they are
_BLOCKS = (1, 16, 32, 128)  # a prefix cache holds whole blocks of so many tokens (vLLM: 16, on a CPU 32 or 128)


@dataclass(frozen=True, slots=True)
class Target:
    """One row and the tokens of it that are compared.

    Example: the third token of a row, sampled under version 4: `Target(row, positions=(2,))`.
    """

    row: TokenSequence
    positions: tuple[int, ...]  # ascending, each > 0

    @property
    def token_ids(self) -> Tensor:
        return torch.tensor(self.row.token_ids)


def choose_targets(rows: Sequence[TokenSequence], version: int, vocab_size: int) -> list[Target]:
    """The tokens of `version` with a finite logprob, row after row spread over the whole list, up to what is cheap."""
    most = max(min(MAX_TOKENS, MAX_LOGITS // max(vocab_size, 1)), 1)
    found = [(row, _positions(row, version)) for row in rows]
    found = [(row, positions) for row, positions in found if positions]
    chosen: list[Target] = []
    total = sum(len(positions) for _, positions in found)
    stride = max(total // most, len(found) // MAX_ROWS, 1)  # every so many rows first: a few are of the whole batch
    for row, positions in (pair for offset in range(stride) for pair in found[offset::stride]):
        positions = positions[:most]
        chosen.append(Target(row, positions))
        most -= len(positions)
        if most <= 0 or len(chosen) == MAX_ROWS:
            break
    return chosen


def _positions(row: TokenSequence, version: int) -> tuple[int, ...]:
    return tuple(
        t
        for t, (mask, label, logprob) in enumerate(zip(row.loss_mask, row.policy_versions, row.behavior_logprobs))
        if mask and t > 0 and label == version and abs(logprob) < float("inf") and logprob == logprob
    )


class Prober:
    """Predictions for `targets`, all tokens of policy version `version`, which is what `model` holds now."""

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], version: int, temperature: float,
        versions: VersionSource | None = None, older: Sequence[int] = (), names: Mapping[int, str] | None = None,
    ) -> None:  # fmt: skip
        """`older`: the versions of `versions` that the engine may have had in this one's place; `names` are what they
        are called, by default by their number."""
        self._names = names or {}
        self._model = unwrap(model)
        self._targets = targets
        self._version = version
        self._temperature = temperature
        self._versions = versions
        self._older = tuple(older)
        self._scoring = ScoringModel(self._model, temperature)
        self._ids = torch.cat([target.token_ids[list(target.positions)] for target in targets])

    @torch.no_grad()
    def compared(self) -> Compared:
        """The tokens as they were recorded, and as the trainer scores them."""
        recorded = [target.row.behavior_logprobs[t] for target in self._targets for t in target.positions]
        rows = [index for index, target in enumerate(self._targets) for _ in target.positions]
        return Compared(torch.tensor(recorded), self._logprobs(self._model), torch.tensor(rows))

    @torch.no_grad()
    def logprobs_at(self, temperature: float) -> Tensor:
        """Logprobs [n] of the tokens under the model as it is, at another temperature."""
        return logprobs_at(self._logits(self._model), self._ids, temperature)

    @torch.no_grad()
    def probes(self, compared: Compared) -> list[Probe]:
        """Every fault that can be predicted here."""
        with _evaluating(self._model):
            found = [*self._of_temperature(compared), *self._of_rounding(), *self._of_context()]
            for version in self._older:
                found += self._of_version(version)
            return [*found, *self._of_kept_keys()]

    # ------------------------------------------------------------------------------------------------ predictions

    def _of_temperature(self, compared: Compared) -> Iterator[Probe]:
        if len(self._ids) < _FITTED:
            return
        logits = self._logits(self._model)
        fit = fit_temperatures(logits, self._ids, compared.recorded)
        yield fit.probe(logprobs_at(logits, self._ids, fit.recorded), self._temperature)

    def _of_rounding(self) -> Iterator[Probe]:
        with bf16_head(self._model):
            yield Probe("bf16_head", self._logprobs(self._model), "the output layer in bfloat16")
        with as_published(self._model, "bfloat16"):
            yield Probe("bf16_weights", self._logprobs(self._model), "weights rounded to bfloat16")
        if self._has_bfloat16():
            whole = _in_bfloat16(self._model)
            yield Probe("bf16_compute", self._logprobs(whole), "everything in bfloat16")
            with fp32_head(whole):
                yield Probe("bf16_compute", self._logprobs(whole), "everything but the output layer in bfloat16")

    def _has_bfloat16(self) -> bool:
        """Whether a forward in bfloat16 takes seconds here. A processor without such products takes hundreds of times
        as long as for fp32: fine for a tiny model."""
        if _device(self._model).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return True
        num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        return num_parameters * sum(len(target.row) for target in self._targets) < 1e9

    def _of_context(self) -> Iterator[Probe]:
        """The commonest drift of a template: the first token missing, or there twice."""
        bos = getattr(getattr(self._model, "config", None), "bos_token_id", None)
        changes: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            ("lack the first token", lambda ids: ids[1:]),
            ("have the first token twice", lambda ids: torch.cat([ids[:1], ids])),
        ]
        if isinstance(bos, int):
            changes.append((f"begin with token {bos}", lambda ids: torch.cat([torch.tensor([bos]), ids])))
        for detail, change in changes:
            parts = []
            for target in self._targets:
                ids = change(target.token_ids)
                shift = len(ids) - len(target.row)
                places = torch.tensor(target.positions) + shift
                before = (places - 1).clamp_min(0).to(_device(self._model))  # a row that begins with a sampled token
                logits = logits_at(self._model, ids[None].to(before.device), before).float().cpu()
                parts.append(logprobs_at(logits, target.token_ids[list(target.positions)], self._temperature))
            yield Probe("context_drift", torch.cat(parts), f"the engine's rows {detail}")

    def _of_version(self, version: int) -> Iterator[Probe]:
        """Its weights in the place of the served ones; and the served ones on prompts whose keys it computed."""
        assert self._versions is not None
        try:
            self._scoring.bring(self._versions, version)
        except VersionError:  # gone from the log: it cannot be asked
            return
        predicted = self._logprobs(self._scoring.module)
        called, ours = (self._names.get(v, f"version {v}") for v in (version, self._version))
        yield Probe("wrong_version", predicted, f"it computes with {called}, not with {ours}")
        for block in _BLOCKS:
            parts = [self._on_cached_prompts(target, version, block) for target in self._targets]
            detail = f"keys of prompts are of {called}, in blocks of {block}"
            yield Probe("stale_prefix_cache", torch.cat(parts), detail)

    def _of_kept_keys(self) -> Iterator[Probe]:
        """Replies of several versions, as an engine computes them that keeps its keys at a publication."""
        turns = [list(turns_of(target)) for target in self._targets]
        kept = [[kept_spans(target.row, start, positions[-1]) for start, positions in found] for target, found in
                zip(self._targets, turns)]  # fmt: skip
        num_mixed = sum(len(spans) > 1 for found in kept for spans in found)
        if not num_mixed or self._versions is None:
            return
        try:
            parts = [
                self._on_kept_keys(Target(target.row, positions), spans)
                for target, found, of in zip(self._targets, turns, kept)
                for (_, positions), spans in zip(found, of)
            ]
        except VersionError:
            return
        declared = sum(t.row.kv_versions[p] < t.row.policy_versions[p] for t in self._targets for p in t.positions)
        detail = f"{num_mixed} replies went on with keys of before a publication"
        yield Probe("stale_kv", torch.cat(parts), f"{detail}; the engine says so of {declared} tokens")

    # --------------------------------------------------------------------------------------------------- forwards

    def _logits(self, model: nn.Module) -> Tensor:
        """Raw logits [n, V] of all targets."""
        return torch.cat([self._row_logits(model, target) for target in self._targets])

    def _row_logits(self, model: nn.Module, target: Target) -> Tensor:
        places = torch.tensor(target.positions, device=_device(model)) - 1
        return logits_at(model, target.token_ids[None].to(places.device), places).float().cpu()

    def _logprobs(self, model: nn.Module) -> Tensor:
        return logprobs_at(self._logits(model), self._ids, self._temperature)

    def _on_cached_prompts(self, target: Target, version: int, block: int) -> Tensor:
        """Each turn's prompt up to a whole block under `version`, what follows under the present weights. The last
        token of a prompt is always computed: something must predict the next."""
        parts = []
        for start, positions in turns_of(target):
            cached = (start - 1) // block * block
            spans = [(version, 0, cached), (self._version, cached, positions[-1])] if cached else []
            parts.append(self._on_kept_keys(Target(target.row, positions), spans))
        return torch.cat(parts)

    def _on_kept_keys(self, target: Target, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """Logprobs of the target where tokens [start, stop) went through the weights of a version, span by span."""
        ids = torch.tensor(target.row.token_ids)[list(target.positions)]
        if len(spans) < 2:
            return logprobs_at(self._row_logits(self._model, target), ids, self._temperature)
        cache, logits = None, []
        token_ids = target.token_ids[None].to(_device(self._model))
        wanted = torch.tensor(target.positions, device=token_ids.device) - 1
        for version, start, stop in spans:
            module = self._model
            if version != self._version:
                assert self._versions is not None
                self._scoring.bring(self._versions, version)
                module = self._scoring.module
            done = module(input_ids=token_ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            logits.append(done.logits[0, inside].float().cpu())
        return logprobs_at(torch.cat(logits), ids, self._temperature)


def turns_of(target: Target) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(where its sampling began, the target's positions in it) for each uninterrupted run of sampled tokens."""
    mask, wanted = target.row.loss_mask, set(target.positions)
    start = 0
    while start < len(mask):
        if not mask[start]:
            start += 1
            continue
        stop = start
        while stop < len(mask) and mask[stop]:
            stop += 1
        if positions := tuple(t for t in range(start, stop) if t in wanted):
            yield start, positions
        start = stop


def kept_spans(row: TokenSequence, start: int, last: int) -> list[tuple[int, int, int]]:
    """(version, start, stop) of what an engine that keeps its keys puts through the weights of each version, for the
    reply that begins at `start`, up to what predicts its token `last`. The prompt goes through the weights that sample
    the first token; where the version changes, the token before already goes through the new ones."""
    spans: list[tuple[int, int, int]] = []
    begin = 0
    for t in range(start + 1, last + 1):
        if row.policy_versions[t] != row.policy_versions[t - 1]:
            spans.append((row.policy_versions[t - 1], begin, t - 1))
            begin = t - 1
    return [*spans, (row.policy_versions[last], begin, last)]


# ------------------------------------------------------------------------------------------------------ rounding


@contextlib.contextmanager
def bf16_head(model: nn.Module) -> Iterator[None]:
    """The output layer as bfloat16 computes it: hidden states, weights and logits rounded."""
    layer = unwrap(model).get_output_embeddings()  # type: ignore[operator]

    def rounded(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        logits = F.linear(_rounded(inputs[0]), _rounded(layer.weight), None if bias is None else _rounded(bias))  # type: ignore[arg-type]
        return _rounded(logits)

    handle = layer.register_forward_hook(rounded)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def fp32_head(model: nn.Module) -> Iterator[None]:
    """The output layer of a bfloat16 model in fp32, as engines offer it."""
    layer = unwrap(model).get_output_embeddings()  # type: ignore[operator]

    def widened(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        return F.linear(inputs[0].float(), layer.weight.float(), None if bias is None else bias.float())  # type: ignore[operator]

    handle = layer.register_forward_hook(widened)
    try:
        yield
    finally:
        handle.remove()


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy of its own: converting one that shares tensors with the model in training would convert that, too."""
    copied = copy.deepcopy(model)
    if getattr(copied.__dict__.get("forward"), "__self__", None) is not copied:  # mixed precision's, of the original
        copied.__dict__.pop("forward", None)
    return copied.requires_grad_(False).eval().to(torch.bfloat16)


def _rounded(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(torch.bfloat16).to(value.dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with a cache where gradients are checkpointed."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
