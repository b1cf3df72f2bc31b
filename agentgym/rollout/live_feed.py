"""The feed of what a policy samples. Must never know an environment or HTTP.

Law: while sampling is paused, a page holds every token that was sampled for a followed trajectory: completions that
ended are shown before whoever asked for them has them, interrupted ones when a page is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.engine.gate import VersionedPolicy
from agentgym.policy import Completion, SamplingParams
from agentgym.rollout.feed import Feed, FeedPage


class LiveFeed(Feed):
    """Follows the trajectories that were begun here, by the session that requests to `policy` name.

    Example: `feed.begin("g-0.0", "g-0")`, requests with `session="g-0.0"`, then `feed.page(0, max_tokens=65_536)`.
    """

    def __init__(self, policy: VersionedPolicy) -> None:
        super().__init__()
        self._policy = policy
        policy.on_completion = self._show

    def page(self, cursor: int, max_tokens: int) -> FeedPage:
        """As `read`. Of a completion being sampled it holds what was sampled up to its last interruption."""
        for under_way in self._policy.in_flight():
            if under_way.session is not None and under_way.session in self:
                segments = under_way.segments
                token_ids = [token for segment in segments for token in segment.token_ids]
                versions = [segment.policy_version for segment in segments for _ in segment.token_ids]
                self.extend(under_way.session, under_way.prompt_ids, token_ids, versions)
        cursor, pieces, is_all = self.read(cursor, max_tokens)
        pause = self._policy.pause_under_way
        live = self.live if is_all else None
        return FeedPage(cursor, pieces, live, self._policy.policy_version, pause.pause_id if pause else None)

    def _show(self, prompt_ids: Sequence[int], params: SamplingParams, completion: Completion) -> None:
        if params.session is not None and params.session in self:
            self.extend(params.session, prompt_ids, completion.token_ids, completion.policy_versions)
