"""`accelerate launch -m agentgym_trainer CONFIG [key=value ...]`: the train command on several processes."""

import logging
import os

import typer

from agentgym.view.failures import guarded, log_to_stderr
from agentgym_trainer.command import train

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    log_to_stderr(logging.INFO)
    typer.run(guarded(train))
