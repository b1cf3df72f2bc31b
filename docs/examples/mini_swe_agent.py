"""mini-swe-agent plays an episode: its own loop and prompts, its commands in one of our boxes, its model ours.

    # in an environment of its own
    pip install mini-swe-agent==2.4.6 litellm==1.106.2 mcp==2.3.0
    pip install --no-deps agentgym-rl
    python docs/examples/mini_swe_agent.py http://127.0.0.1:8000 --task "Write 6 * 7 into answer.txt." --expect 42

The harness is not changed: it is given the session's base URL and key as those of any OpenAI-compatible model, and a
class of ten lines that runs its commands in a box. What the episode earned is decided here, from the box, after the
agent has ended; its own key could not say it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

for name, value in {
    "MSWEA_SILENT_STARTUP": "1",
    "MSWEA_COST_TRACKING": "ignore_errors",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}.items():
    os.environ.setdefault(name, value)  # before the harness is imported, which reads them

import httpx  # noqa: E402
from minisweagent.agents.default import DefaultAgent  # noqa: E402
from minisweagent.environments.local import LocalEnvironment  # noqa: E402
from minisweagent.models.litellm_model import LitellmModel  # noqa: E402

from agentgym.errors import SandboxTimeoutError  # noqa: E402
from agentgym.sandbox.choose import open_sandbox  # noqa: E402
from agentgym.sandbox.spec import Sandbox, SandboxSpec  # noqa: E402

SYSTEM = "You are a helpful assistant that can interact with a computer."
INSTANCE = (
    "Please solve this task: {{task}}\n\nYou can execute bash commands. Each response must make at least one call of "
    "the tool bash. When you are done, run `echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT` alone."
)


class BoxEnvironment(LocalEnvironment):
    """Commands run in a box of agentgym instead of on this machine."""

    def __init__(self, box: Sandbox, **config: Any) -> None:
        super().__init__(**config)
        self.box = box

    def execute(self, action: dict, cwd: str = "", *, timeout: int | None = None) -> dict[str, Any]:
        command = ["bash", "-c", action.get("command", "")]
        try:
            result = self.box.exec(command, timeout_s=timeout or self.config.timeout, cwd=cwd or None)
        except SandboxTimeoutError as error:
            return {"output": "", "returncode": -1, "exception_info": str(error)}
        text = (result.stdout + result.stderr).decode("utf-8", "replace")
        output = {"output": text, "returncode": result.exit_code, "exception_info": ""}
        self._check_finished(output)
        return output

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        return {**self.config.model_dump(), **platform.uname()._asdict(), **kwargs}  # not this machine's environment


def solve(session: dict[str, Any], box: Sandbox, task: str) -> str:
    """Has the harness work on `task`; how it ended."""
    model = LitellmModel(
        model_name=f"openai/{session['model']}",
        model_kwargs={"api_base": session["base_url"], "api_key": session["api_key"], "temperature": 1.0},
        cost_tracking="ignore_errors",
    )
    agent = DefaultAgent(
        model, BoxEnvironment(box), system_template=SYSTEM, instance_template=INSTANCE, step_limit=20, cost_limit=0.0
    )
    return str(agent.run(task).get("exit_status"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="where the service listens")
    parser.add_argument("--task", required=True)
    parser.add_argument("--expect", required=True, help="what answer.txt must hold at the end")
    parser.add_argument("--name", help="the task's name; siblings share it (default: the task)")
    parser.add_argument("--key", help="server.api_key_file's, if the service has one")
    parser.add_argument("--tier", default="auto", help="the kind of box")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    with httpx.Client(base_url=options.url, headers=headers, timeout=60, trust_env=False) as service:
        opened = service.post("/v1/sessions", json={"task": options.name or options.task})
        session = opened.raise_for_status().json()
        with open_sandbox(options.tier, SandboxSpec()) as box:
            status = solve(session, box, options.task)
            found = box.exec(["cat", "answer.txt"], timeout_s=60.0)
        reward = float(found.stdout.decode("utf-8", "replace").strip() == options.expect)
        body = {"components": {"solved": reward}, "status": "terminated" if status == "Submitted" else "truncated"}
        done = service.post(f"/v1/sessions/{session['id']}/finish", json=body).raise_for_status().json()
    print(json.dumps({"exit_status": status, "reward": reward, "session": done}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
