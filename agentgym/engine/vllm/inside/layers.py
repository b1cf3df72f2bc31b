"""The layer that a tensor is of. Law: who sends weights and who loads them agree on it, so both take it from here."""

from __future__ import annotations


def layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; `model.norm` of `model.norm.weight`."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])
