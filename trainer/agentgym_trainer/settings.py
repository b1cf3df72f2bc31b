"""Everything a training run is configured by: the rollout service's sections and the trainer's own.

One TOML file holds both, because `agentgym train` starts the service from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from agentgym.config import Section
from agentgym.server.settings import OUTSIDE, ServiceConfig
from agentgym_trainer.loss_settings import ON_TOTAL_RATIO, LossSection

FallbackName = Literal["ewma", "linear", "loglinear", "resident", "behavior"]
AnchorName = Literal[
    "auto", "snapshot", "old_logit_model", "interrupt", "ewma", "linear", "loglinear", "resident", "behavior"
]
AdvantageName = Literal["group_mean", "group_mean_std", "leave_one_out", "batch_mean"]


class RunSection(Section):
    """Where a run lives. An earlier run under the same name is kept, renamed with the time it was made."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    service_url: str | None = None  # connect to a running service (`agentgym serve`) instead of starting one
    service_key_file: Path | None = None  # the trainer.key that the service wrote into its run folder

    @model_validator(mode="after")
    def _key(self) -> RunSection:
        if (self.service_url is None) != (self.service_key_file is None):
            raise ValueError("service_url and service_key_file go together: where it listens, and its trainer.key")
        return self


class LoraSection(Section):
    """A low-rank adapter beside frozen weights: the adapter is what is trained, published and kept. Whoever cannot hold
    the optimizer's state of the whole model, or cannot move the whole model at every step, sets `rank`; the learning
    rate is then some ten times that of the whole model."""

    rank: int = Field(ge=1)
    alpha: int = Field(default=32, ge=1)  # the adapter counts alpha / rank times
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # all but the output layer; or names

    @field_validator("dropout")
    @classmethod
    def _none(cls, value: float) -> float:
        if value != 0.0:
            raise ValueError(
                f"must be 0, got {value}: old logprobs, engines and the policy would each drop something else"
            )
        return value

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError('must name modules, such as ["q_proj", "v_proj"], or be "all-linear"')
        return value


class TrainerSection(Section):
    """The optimizer's side of a run."""

    steps: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0.0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)  # optimizer steps, of which a batch has updates_per_batch
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    advantages: AdvantageName = "group_mean"
    overlong_tokens: int = Field(default=0, ge=0)  # DAPO's soft punishment at an episode's last so many; 0: none
    overlong_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)  # off the score, at the limit
    anchor: AnchorName = "auto"
    # Whose logprobs stand in, counted, for tokens without exact ones; None: such a token ends the run, but for `auto`,
    # where it is ewma. Of `auto`, `old_logit_model` and `interrupt`.
    anchor_fallback: FallbackName | None = None
    old_logit_device: str | None = None  # of `old_logit_model`: where the scorer computes; None: the CPU
    old_logit_queue_tokens: int | None = Field(default=None, ge=1)  # it may be behind by so many; None: 262,144
    interrupt_limit_s: float | None = Field(default=None, gt=0.0, le=3600.0)  # a pause's longest time; None: 120
    # of anchor linear or loglinear: the behavior policy's share of a token, whatever its lag; None: 1/max(lag, 1)
    interpolation_weight: float | None = Field(default=None, gt=0.0, lt=1.0)
    updates_per_batch: int = Field(default=1, ge=1)  # optimizer steps per publication
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    # Longer rows are left out and counted; None: the engine's max_context.
    max_sequence_tokens: int | None = Field(default=None, ge=2)
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    publish_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 where the engine serves it: small deltas
    lora: LoraSection | None = None  # None: all weights are trained
    on_discrepancy: Literal["warn", "stop", "ignore"] = "warn"  # engine and trainer disagree about the same weights
    discrepancy_floor: float | None = Field(default=None, gt=0.0)  # of mean exp|dlogp| - 1; None: 1e-4, in bf16 0.05
    # Tokens with which vLLM servers are compared after a publication; 0: none, where a forward of so many is too dear.
    probe_tokens: int = Field(default=64, ge=0)
    probe_tolerance: float | None = Field(default=None, gt=0.0)  # of a logprob; None: 1e-3, and 1 in bfloat16
    threads: int = Field(default=1, ge=1)  # compute threads per trainer process on a CPU
    checkpoint_every: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    batch_timeout_s: float = Field(default=1800.0, gt=0.0)  # without a batch for so long, the run ends
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # through Accelerate

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise ValueError(f"must be two numbers of at least 0 and below 1, such as [0.9, 0.95], got {list(value)}")
        return value

    @model_validator(mode="after")
    def _a_probe_has_a_logprob(self) -> TrainerSection:
        if self.probe_tokens == 1:
            raise ValueError("probe_tokens must be 0 (none) or >= 2, since the first token has no logprob, got 1")
        if self.probe_tolerance is not None and not self.probe_tokens:
            raise ValueError(
                f"probe_tolerance = {self.probe_tolerance:g} does nothing with probe_tokens = 0: drop it, or say how "
                "many tokens are compared"
            )
        return self


class EvaluationSection(Section):
    """Held-out evaluation before and after training, and every `every` steps (0: not in between)."""

    episodes: int = Field(default=256, ge=0)  # 0: none
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    every: int = Field(default=0, ge=0)


class TrainConfig(ServiceConfig):
    """A whole run. Example: configs/quickstart.toml."""

    run: RunSection = RunSection()
    trainer: TrainerSection = TrainerSection()
    loss: LossSection = LossSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        """`run.seed` is the seed of what names none of its own."""
        if not isinstance(values, dict) or not isinstance(values.get("run", {}), dict):
            return values
        seed = values.get("run", {}).get("seed", 0)
        seeded = {
            name: {"seed": seed, **values.get(name, {})}
            for name in ("model", "rollout")
            if isinstance(values.get(name, {}), dict)
        }
        return {**values, **seeded}

    @model_validator(mode="before")
    @classmethod
    def _nothing_to_correct(cls, values: Any) -> Any:
        """With anchor `behavior` r_d is 1: whoever names no correction means none."""
        if not isinstance(values, dict):
            return values
        trainer, loss = values.get("trainer", {}), values.get("loss", {})
        if not isinstance(trainer, dict) or not isinstance(loss, dict) or trainer.get("anchor") != "behavior":
            return values
        return {**values, "loss": {"correction": "none", **loss}}

    @model_validator(mode="after")
    def _weight_is_read(self) -> TrainConfig:
        weight, anchor = self.trainer.interpolation_weight, self.trainer.anchor
        if weight is not None and anchor not in ("linear", "loglinear"):
            raise ValueError(
                f"trainer.interpolation_weight = {weight:g} does nothing with trainer.anchor = {anchor!r}: drop it, or "
                "choose 'linear' or 'loglinear'"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits_anchor(self) -> TrainConfig:
        loss, anchor = self.loss, self.trainer.anchor
        if loss.objective in ON_TOTAL_RATIO and anchor != "behavior":
            raise ValueError(
                f"loss.objective {loss.objective!r} acts on the total ratio R and asks no anchor; "
                f"set trainer.anchor = 'behavior', got {anchor!r}"
            )
        if anchor == "behavior" and (loss.correction != ("none",) or loss.veto):
            chosen = f"veto = {loss.veto:g}" if loss.correction == ("none",) else f"correction = {loss.correction[0]!r}"
            raise ValueError(
                f"loss.{chosen} does nothing with trainer.anchor = 'behavior', where r_d is 1: drop it, or choose "
                "an anchor such as 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_somewhere(self) -> TrainConfig:
        if self.env.id == OUTSIDE and self.evaluation.episodes:
            raise ValueError(
                "evaluation.episodes must be 0 without env.id: there is no environment to evaluate in, got "
                f"{self.evaluation.episodes}"
            )
        return self

    @model_validator(mode="after")
    def _scores_mean_something(self) -> TrainConfig:
        trainer, limit = self.trainer, self.rollout.max_episode_tokens
        if trainer.overlong_tokens >= limit:
            raise ValueError(
                f"trainer.overlong_tokens must be < rollout.max_episode_tokens ({limit}), got {trainer.overlong_tokens}"
            )
        if trainer.overlong_penalty != 1.0 and trainer.overlong_tokens == 0:
            raise ValueError(
                f"trainer.overlong_penalty = {trainer.overlong_penalty:g} does nothing without "
                "trainer.overlong_tokens: drop it, or say over how many tokens it grows"
            )
        if self.rollout.cipo is not None and trainer.advantages == "batch_mean":
            raise ValueError(
                "rollout.cipo needs baselines of groups, and trainer.advantages = 'batch_mean' is one of corrections "
                "and plain episodes together; choose 'group_mean', 'group_mean_std' or 'leave_one_out'"
            )
        if self.rollout.drop_zero_variance and trainer.advantages == "batch_mean":
            raise ValueError(
                "rollout.drop_zero_variance drops groups that have no gradient under a baseline of their own, and with "
                "trainer.advantages = 'batch_mean' they have one; choose 'group_mean', or keep them"
            )
        return self

    @model_validator(mode="after")
    def _options_of_exact_anchors(self) -> TrainConfig:
        trainer = self.trainer
        readers = {
            "anchor_fallback": ("auto", "old_logit_model", "interrupt"),
            "old_logit_device": ("old_logit_model",),
            "old_logit_queue_tokens": ("old_logit_model",),
            "interrupt_limit_s": ("interrupt",),
        }
        for name, anchors in readers.items():
            if getattr(trainer, name) is not None and trainer.anchor not in anchors:
                raise ValueError(
                    f"trainer.{name} does nothing with trainer.anchor = {trainer.anchor!r}: drop it, or choose "
                    f"{' or '.join(map(repr, anchors))}"
                )
        if trainer.anchor == "interrupt" and trainer.updates_per_batch != 1:
            raise ValueError(
                f"trainer.anchor 'interrupt' scores with the weights that sampled, just before they change: it needs "
                f"one optimizer step per publication, trainer.updates_per_batch = 1, got {trainer.updates_per_batch}"
            )
        if trainer.anchor == "interrupt" and self.engine.publish_mode != "abort":
            raise ValueError(
                "trainer.anchor 'interrupt' interrupts running requests before each publication, so that nothing is "
                f"left to wait for or to keep: engine.publish_mode must be 'abort', got {self.engine.publish_mode!r}"
            )
        return self

    @model_validator(mode="after")
    def _groups_fill_updates(self) -> TrainConfig:
        if self.rollout.groups_per_step < self.trainer.updates_per_batch:
            raise ValueError(
                f"trainer.updates_per_batch ({self.trainer.updates_per_batch}) must be <= "
                f"rollout.groups_per_step ({self.rollout.groups_per_step}): each update needs a group"
            )
        return self

    @model_validator(mode="after")
    def _weights_reach_the_engine(self) -> TrainConfig:
        if self.engine.dtype == "bfloat16" and self.trainer.publish_dtype == "float32":
            raise ValueError(
                "trainer.publish_dtype must be 'bfloat16' where engine.dtype is 'bfloat16', got 'float32': the engine "
                "would round what is published, and no old logprob would be of what it serves"
            )
        if self.trainer.lora and (self.engine.max_lora_rank or self.trainer.lora.rank) < self.trainer.lora.rank:
            raise ValueError(
                f"engine.max_lora_rank ({self.engine.max_lora_rank}) must be >= trainer.lora.rank "
                f"({self.trainer.lora.rank}); leave it out"
            )
        return self

    def service(self) -> ServiceConfig:
        """The sections that the rollout service is started with."""
        sections = {name: getattr(self, name) for name in ServiceConfig.model_fields}
        if self.trainer.lora and self.engine.kind == "vllm" and self.engine.max_lora_rank is None:
            sections["engine"] = self.engine.model_copy(update={"max_lora_rank": self.trainer.lora.rank})
        return ServiceConfig(**sections)
