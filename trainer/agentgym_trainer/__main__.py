"""`accelerate launch -m agentgym_trainer CONFIG [key=value ...]`: the train command on several processes."""

import typer

from agentgym_trainer.command import train

if __name__ == "__main__":
    typer.run(train)
