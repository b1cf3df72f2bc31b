"""The rollout service as a child process; started by `agentgym.server.client.start_service`. People use
`agentgym serve`."""

from __future__ import annotations

import argparse
import json
import logging
import traceback
from pathlib import Path

from agentgym.config import load_config, parse_config
from agentgym.errors import AgentGymError, ConfigError
from agentgym.server.logs import configure
from agentgym.server.process import end_process, run_child
from agentgym.server.settings import ServiceConfig


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m agentgym.server", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the ServiceConfig, .toml or .json")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--run-dir", type=Path, required=True, help="where trajectories go")
    parser.add_argument("--versions-dir", type=Path, required=True, help="the only folder weights are loaded from")
    parser.add_argument("--ready-fd", type=int, required=True, help="an inherited pipe; told the address and the key")
    options = parser.parse_args()
    configure("text")
    try:
        config = read_config(options.config)
        configure(config.server.log_format)
        return run_child(config, options.model, options.run_dir, options.versions_dir, options.ready_fd)
    except AgentGymError as error:
        logging.error("%s", error)
        return error.exit_code


def read_config(path: Path) -> ServiceConfig:
    """Reads what a parent wrote (.json) or a person (.toml). Raises ConfigError."""
    if path.suffix != ".json":
        return load_config(ServiceConfig, path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    return parse_config(ServiceConfig, values, source=str(path))


def _run() -> int:
    try:
        return main()
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - a bug: its traceback belongs into the log that the parent shows the end of
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    end_process(_run())
