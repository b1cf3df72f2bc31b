"""Which requests are one request, sent again: said by the client, never guessed from equal content."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.server.replies import Question, Reply, Sampling
from agentgym.server.sessions_retries import KEPT, KeyReusedError, Retries

QUESTION = Question((Message("user", "hello"),), (), Sampling(), retry_key=None, retry_count=0)
OTHER = replace(QUESTION, messages=(Message("user", "good bye"),))


class Server:
    """Samples for whoever is not a repetition; says which sample each request got."""

    def __init__(self) -> None:
        self.retries = Retries()
        self.samples = 0
        self.go = asyncio.Event()
        self.go.set()

    async def ask(self, question: Question, *, deliver: bool = True, fail: bool = False) -> str:
        async with self.retries.ask(question) as asked:
            if not asked.known:
                self.samples += 1
                text = f"sample {self.samples}"
                await self.go.wait()
                if fail:
                    raise RuntimeError("the engine failed")
                message = Message("assistant", text)
                asked.known = (Reply((1,), Completion((2,), (0.0,), (0,), (0,), "stop"), text, "stop", message),)
            asked.delivered = asked.delivered or deliver
            return asked.known[0].text


def test_equal_content_alone_is_two_requests():
    async def main() -> None:
        server = Server()
        assert [await server.ask(QUESTION) for _ in range(3)] == ["sample 1", "sample 2", "sample 3"]

    asyncio.run(main())


def test_a_repeated_key_gets_the_stored_reply_and_another_key_another():
    async def main() -> None:
        server = Server()
        one, two = (replace(QUESTION, retry_key=key) for key in ("one", "two"))
        assert [await server.ask(q) for q in (one, one, two, one)] == ["sample 1", "sample 1", "sample 2", "sample 1"]
        with pytest.raises(KeyReusedError, match="'one' came before with another request"):
            await server.ask(replace(OTHER, retry_key="one"))

    asyncio.run(main())


def test_a_retry_gets_the_reply_that_was_lost():
    async def main() -> None:
        server = Server()
        await server.ask(QUESTION)
        await server.ask(QUESTION, deliver=False)  # lost on its way
        await server.ask(QUESTION)
        assert await server.ask(replace(QUESTION, retry_count=1)) == "sample 2"
        assert await server.ask(replace(OTHER, retry_count=1)) == "sample 4"  # its first attempt never came here
        assert await server.ask(QUESTION) == "sample 5"

    asyncio.run(main())


def test_a_retry_of_what_was_handed_over_gets_the_latest():
    async def main() -> None:
        server = Server()
        await server.ask(QUESTION)
        await server.ask(QUESTION)
        assert await server.ask(replace(QUESTION, retry_count=1)) == "sample 2"
        assert await server.ask(replace(QUESTION, retry_count=2)) == "sample 2"

    asyncio.run(main())


@pytest.mark.parametrize("repeat", [{"retry_key": "k"}, {"retry_count": 1}])
def test_a_request_in_flight_is_joined(repeat):
    async def main() -> None:
        server = Server()
        server.go.clear()
        first = asyncio.create_task(server.ask(replace(QUESTION, retry_key=repeat.get("retry_key"))))
        await asyncio.sleep(0)
        second = asyncio.create_task(server.ask(replace(QUESTION, **repeat)))
        await asyncio.sleep(0.01)
        assert not second.done()
        server.go.set()
        assert await asyncio.gather(first, second) == ["sample 1", "sample 1"]

    asyncio.run(main())


def test_what_failed_or_was_given_up_is_sampled_again():
    async def main() -> None:
        server = Server()
        keyed = replace(QUESTION, retry_key="k")
        with pytest.raises(RuntimeError):
            await server.ask(keyed, fail=True)
        assert await server.ask(keyed) == "sample 2"
        server.go.clear()
        gone = asyncio.create_task(server.ask(OTHER))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(server.ask(replace(OTHER, retry_count=1)))
        await asyncio.sleep(0)
        gone.cancel()  # the client hung up; the one that joined samples itself
        server.go.set()
        assert await waiting == "sample 4"

    asyncio.run(main())


def test_memory_is_bounded_and_what_is_in_flight_is_never_forgotten():
    async def main() -> None:
        server = Server()
        server.go.clear()
        slow = asyncio.create_task(server.ask(replace(QUESTION, retry_key="slow")))
        await asyncio.sleep(0)
        server.go.set()
        for number in range(2 * KEPT):
            await server.ask(replace(OTHER, retry_key=str(number)))
        assert await slow == "sample 1"
        assert len(server.retries._asked) <= KEPT + 1

    asyncio.run(main())
