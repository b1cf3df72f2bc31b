"""The bundled environments, and the pattern of every plug-in: importing the package registers them and nothing else.

What `register` names as text is imported when it is first used.
"""

from agentgym.registry import register

register(
    "agentgym/ReverseText-v0", "agentgym_envs.reverse_text:ReverseText",
    max_turns=1, oracle="agentgym_envs.reverse_text:oracle", alias="reverse_text",
)  # fmt: skip
register(
    "agentgym/GuessNumber-v0", "agentgym_envs.guess_number:GuessNumber",
    max_turns=7, oracle="agentgym_envs.guess_number:binary_search", habit="agentgym_envs.guess_number:count_up",
    alias="guess_number",
)  # fmt: skip
register(
    "agentgym/Maze-v0", "agentgym_envs.maze:Maze",
    max_turns=7, oracle="agentgym_envs.maze:oracle", habit="agentgym_envs.maze:habit", alias="maze",
)  # fmt: skip
register(
    "agentgym/PythonMath-v0", "agentgym_envs.python_math:PythonMath",
    max_turns=6, oracle="agentgym_envs.python_math:oracle", alias="python_math",
)  # fmt: skip
