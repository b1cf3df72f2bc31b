"""The training loop: take a batch, learn from it, publish the weights, write down what happened.

Law: every rank runs these lines; only rank 0 has a `Leader`, which talks to the rollout service. A batch is
acknowledged once a durable checkpoint contains its update. What a step does to the weights is `learner.py`.
"""

from __future__ import annotations

import contextlib
import functools
import time

from accelerate.utils import set_seed
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from agentgym.errors import InputError
from agentgym.server.models import model_id, resolve_model
from agentgym.versions import VersionReader
from agentgym_trainer.anchors.interrupt import Interruption, Sampling
from agentgym_trainer.anchors.recorded import RecordedAnchor
from agentgym_trainer.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from agentgym_trainer.exchange import BatchExchange
from agentgym_trainer.leader import Leader
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.lora import require_targets
from agentgym_trainer.preflight import check
from agentgym_trainer.publish import published_metadata, save_model
from agentgym_trainer.published_probe import published_probe
from agentgym_trainer.run_folder import RunFolder
from agentgym_trainer.settings import TrainConfig

INTERRUPT_S = 120.0  # an interruption's longest pause where the configuration names none


def train(config: TrainConfig, resume: RunFolder | None = None) -> None:
    """Runs `config` to its last step, or continues the run in the folder `resume`. Every rank calls it.

    Raises InputError before any work starts, and the typed errors of service, versions and checkpoints at work.
    """
    started = time.monotonic()
    check(config)
    disable_progress_bar()  # one bar a run: ours
    accelerator = make_accelerator(config)
    set_seed(config.run.seed)
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    with accelerator.main_process_first():
        say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
        model_folder = resolve_model(config.model.name, config.env.id, config.model.seed, report=say)
    if config.trainer.lora is not None:
        require_targets(model_folder, config.trainer.lora)
    exchange = BatchExchange(accelerator)
    with contextlib.ExitStack() as stack:
        leader = None
        folder = None
        if accelerator.is_main_process:
            folder = resume or RunFolder.create(config)
            try:
                leader = stack.enter_context(Leader.started(config, folder, model_folder, console))
            except InputError:
                if resume is None:
                    folder.discard()
                raise
        paths = exchange.share("paths", leader.paths if leader else None)
        model = load_model(model_folder, config)
        versions = VersionReader(paths.versions, published_metadata(model))
        learner = Learner(accelerator, model, config, versions, model_id(model_folder))
        interruption = interruption_of(learner, config, exchange, leader.sampling if leader else None)
        progress, anchor_state = Progress(0, 0, {}, 0.0), None
        if resume is not None and (checkpoints := list_checkpoints(paths.checkpoints)):
            progress, anchor_state = load_checkpoint(accelerator, checkpoints[-1])
            learner.load_state(anchor_state)
        if config.trainer.trackers:
            accelerator.init_trackers("agentgym", config={"run": config.run.name, "env": config.env.id})
        if leader:
            leader.begin(learner.published(), progress, started - progress.seconds)
        for number in range(progress.step, config.trainer.steps):
            step = exchange.share(f"step/{number}", leader.next_step(number + 1) if leader else None)
            if step.old_logprobs is not None:
                assert isinstance(learner.anchor, RecordedAnchor)
                learner.anchor.begin_batch(step.old_logprobs)
            interrupt = interruption.before_update if interruption else None
            metrics = learner.learn(step.trajectories, step.trainer_version, interrupt)
            if leader:
                metrics |= interruption.metrics() if interruption else {}
                probe = published_probe(learner.module, step.trajectories, config)
                figures = leader.publish(number + 1, step, learner.published(), metrics, probe)
                if interruption:
                    interruption.published(leader.ended_pause)
                accelerator.log(dict(figures), step=number + 1)
            if _is_due(number + 1, config):
                seconds = time.monotonic() - started + progress.seconds
                now = Progress(number + 1, step.trainer_version + 1, step.batch.data_position, seconds)
                keep = config.trainer.keep_checkpoints
                save_checkpoint(accelerator, paths.checkpoints, now, learner.state(), keep)
                if leader:
                    leader.acknowledge()
        if leader and folder:
            save_model(learner.module, model_folder, folder.model_path)
            leader.finish()
    accelerator.end_training()


def interruption_of(
    learner: Learner, config: TrainConfig, exchange: BatchExchange, sampling: Sampling | None
) -> Interruption | None:
    """What records old logprobs before each update for the anchor `interrupt`."""
    if config.trainer.anchor != "interrupt":
        return None
    assert isinstance(learner.anchor, RecordedAnchor)
    return Interruption(
        learner.module, learner.anchor.records, exchange, sampling, temperature=config.rollout.temperature,
        max_tokens=config.trainer.micro_batch_tokens, limit_s=config.trainer.interrupt_limit_s or INTERRUPT_S,
    )  # fmt: skip


def _is_due(steps_done: int, config: TrainConfig) -> bool:
    return steps_done % config.trainer.checkpoint_every == 0 or steps_done == config.trainer.steps
