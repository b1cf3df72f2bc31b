"""Requests of a session that are sent again, and agents that hang up: what is sampled for nobody leaves no trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from outside_agents import HELLO, Losing, Pace, agent, say, slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_of_the_official_client_gets_the_reply_that_was_lost(service, stream):
    it = service()
    session = it.open()
    network = Losing(1)
    with agent(session, http_client=httpx.Client(transport=network), max_retries=2) as client:
        texts = []
        for _ in range(3):  # equal content: three requests, of which the second is sent twice
            if stream:
                events = client.chat.completions.create(model="small", messages=HELLO, max_tokens=5, stream=True)
                texts.append("".join(c.choices[0].delta.content or "" for c in events if c.choices))
            else:
                texts.append(say(client, HELLO).choices[0].message.content)
    assert network.retries == ["0", "0", "1", "0"]
    done = it.finish(session)
    assert (done["turns"], done["undelivered"]) == (3, 0)


def test_an_idempotency_key_is_one_request_however_often_it_is_sent(service):
    it = service(engine=slow(Pace(0.02)))
    session = it.open()
    with agent(session) as client, ThreadPoolExecutor(4) as pool:

        def ask(key: str, messages: list[Any] = HELLO) -> Any:
            return say(client, messages, extra_headers={"Idempotency-Key": key})

        answers = list(pool.map(ask, ["a"] * 4))  # together: the first is joined
        assert len({tuple(answer.choices[0].token_ids) for answer in answers}) == 1
        assert ask("a").choices[0].token_ids == answers[0].choices[0].token_ids
        assert it.show(session)["turns"] == 1
        ask("b")
        assert it.show(session)["turns"] == 2
        with pytest.raises(openai.UnprocessableEntityError, match="came before with another request"):
            ask("a", [{"role": "user", "content": "2 left"}])


def test_an_agent_that_hangs_up_leaves_no_trace_and_does_not_hold_up_the_end(service):
    it = service(engine=slow(Pace(0.2)))
    session = it.open()
    with agent(session, max_retries=0, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        say(client, HELLO, max_tokens=50)
    with agent(session) as client:
        say(client, HELLO, max_tokens=1)
    assert it.finish(session)["turns"] == 1
