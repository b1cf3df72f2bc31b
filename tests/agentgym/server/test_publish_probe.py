"""A publication with a probe, over HTTP: the engine is asked once it samples again, and what it says comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym.engine.protocol import Probe
from agentgym.errors import EngineError, InputError
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits

PROBE = Probe((1, 7, 5), (-0.5, -2.0), 1e-3)


class Verifying(ScriptedEngine):
    """Says that it is off by what the version is worth, and raises beyond the tolerance."""

    async def verify(self, probe: Probe) -> float | None:
        assert self._going.is_set()
        off = 1e-4 * self.policy_version
        if off > probe.tolerance:
            raise EngineError(f"off by {off:.2g}, {probe.tolerance} is allowed")
        return off


async def verifying(config: ServiceConfig, folder: Path) -> Verifying:
    return Verifying(hashed_logits(30), max_context=config.max_context)


def test_the_difference_comes_back_and_one_that_is_too_large_is_an_error(start: Callable[..., Any]) -> None:
    server = start(engine_factory=verifying)
    assert server.client.publish(1, server.weights(1)).probe_off is None
    assert server.client.publish(2, server.weights(2), PROBE).probe_off == pytest.approx(2e-4)
    with pytest.raises(EngineError, match=r"off by 0\.0011, 0\.001 is allowed"):
        server.client.publish(11, server.weights(11), PROBE)


def test_an_engine_that_cannot_be_verified_compares_nothing(start: Callable[..., Any]) -> None:
    server = start()
    assert server.client.publish(1, server.weights(1), PROBE).probe_off is None


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (Probe((1,), (), 1e-3), "a probe has 2 to 119 tokens"),
        (Probe((1,) * 120, (-1.0,) * 119, 1e-3), "a probe has 2 to 119 tokens"),
        (Probe((1, 2), (-1.0, -1.0), 1e-3), "a logprob of each but the first, got 2 and 2"),
        (Probe((1, 10**6), (-1.0,), 1e-3), "tokens of a probe must be in"),
        (Probe((1, -1), (-1.0,), 1e-3), "tokens of a probe must be in"),
        (Probe((1, 2), (float("nan"),), 1e-3), "finite logprobs and a tolerance > 0"),
        (Probe((1, 2), (-1.0,), 0.0), "finite logprobs and a tolerance > 0"),
        (Probe((1, 2), (-1.0,), float("nan")), "finite logprobs and a tolerance > 0"),
    ],
)
def test_a_probe_that_cannot_be_compared_is_refused_before_anything_is_loaded(
    start: Callable[..., Any], probe: Probe, message: str
) -> None:
    server = start(engine_factory=verifying)
    with pytest.raises(InputError, match=message):
        server.client.publish(1, server.weights(1), probe)
    assert server.client.status().policy_version == 0
