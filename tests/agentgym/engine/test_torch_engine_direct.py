"""The torch engine in the caller's thread: what it samples is the plain forward's, and nothing but the requests and the
weights decides it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentgym.engine.torch_engine_direct import DirectEngine
from agentgym.errors import EngineError, PromptTooLongError
from agentgym.policy import SamplingParams
from agentgym.weight_file import save_file

REQUESTS = [
    (tuple(range(1, 1 + length)), SamplingParams(max_tokens=6 + length % 3, seed=length)) for length in (3, 9, 4, 17, 5)
]


@pytest.fixture
def llama(model_of):
    return model_of("llama")


@torch.no_grad()
def check_logprobs(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert np.allclose(completion.logprobs, wanted.numpy(), atol=1e-4)


def test_completions_are_the_models_in_the_order_of_the_requests(llama):
    folder, model = llama
    engine = DirectEngine(folder, slots=3, max_context=32)  # fewer rows than requests
    completions = engine.sample(REQUESTS)
    for (prompt, params), completion in zip(REQUESTS, completions, strict=True):
        assert len(completion.token_ids) == params.max_tokens
        assert completion.finish_reason == "length"
        check_logprobs(model, prompt, completion)


def test_equal_calls_give_equal_bits(llama):
    folder, _ = llama
    first, second = (DirectEngine(folder, slots=4, max_context=32).sample(REQUESTS) for _ in range(2))
    assert first == second


def test_it_steps_back_to_older_weights_and_keeps_no_keys(llama, perturbed):
    folder, model = llama
    engine = DirectEngine(folder, slots=5, max_context=32)
    made = {version: perturbed(model, version) for version in (1, 2)}
    sampled = {}
    for version in (2, 1, 2):
        engine.load(version, made[version][0])
        assert engine.policy_version == version
        completions = engine.sample(REQUESTS)
        assert {v for one in completions for v in (*one.policy_versions, *one.kv_versions)} == {version}
        assert sampled.setdefault(version, completions) == completions
        check_logprobs(made[version][1], REQUESTS[3][0], completions[3])
    assert sampled[1] != sampled[2]


def test_a_hook_on_the_module_changes_what_is_sampled_and_recorded(llama):
    folder, model = llama
    engine = DirectEngine(folder, slots=5, max_context=32)
    plain = engine.sample(REQUESTS)
    handle = engine.model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: 2.0 * logits)
    hooked = engine.sample(REQUESTS)
    handle.remove()
    assert hooked != plain
    ids = torch.tensor([[*REQUESTS[0][0], *hooked[0].token_ids]])
    with torch.no_grad():
        logprobs = (2.0 * model(ids).logits[0, len(REQUESTS[0][0]) - 1 : -1]).log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(hooked[0].token_ids)[:, None])[:, 0]
    assert np.allclose(hooked[0].logprobs, wanted.numpy(), atol=1e-4)


def test_what_cannot_be_sampled_is_refused(llama):
    engine = DirectEngine(llama[0], slots=2, max_context=16)
    with pytest.raises(PromptTooLongError, match="do not fit the context of 16"):
        engine.sample([(tuple(range(1, 12)), SamplingParams(max_tokens=6, seed=0))])
    with pytest.raises(EngineError, match="needs a seed"):
        engine.sample([((1, 2), SamplingParams(max_tokens=2))])


def test_broken_weights_end_the_call_and_the_next_one_works(llama, perturbed, tmp_path):
    folder, model = llama
    engine = DirectEngine(folder, slots=5, max_context=32)
    broken = {name: np.full(tuple(value.shape), np.nan, np.float32) for name, value in model.state_dict().items()}
    save_file(broken, tmp_path / "broken.safetensors")
    engine.load(1, tmp_path / "broken.safetensors")
    with pytest.raises(EngineError, match="not finite"):
        engine.sample(REQUESTS)
    engine.load(2, perturbed(model, 2)[0])
    assert [one.finish_reason for one in engine.sample(REQUESTS)] == ["length"] * len(REQUESTS)
