"""Text <-> ids of one tokenizer, in two ways: scaffold with its special tokens, outside text without any.

Law: the ids of outside text never hold an id of an added token, whatever the text says. Must never know a message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentgym.errors import TemplateError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_LEAST_LONGEST = 64  # an unknown word, and blanks that a tokenizer joins, are longer than what a small vocabulary says


class Encoder:
    """Wraps the `tokenizer.json` of a model folder."""

    def __init__(self, definition: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        definition = _without_prefix_space(definition) | {"post_processor": None, "truncation": None, "padding": None}
        self._scaffold: Tokenizer = Tokenizer.from_str(json.dumps(definition))
        added = definition.get("added_tokens") or []
        # Runs of blanks are added tokens of some tokenizers and forge nothing; all others are for scaffold only.
        harmless = [token for token in added if not token["content"].strip() and not token.get("special")]
        self._outside: Tokenizer = Tokenizer.from_str(json.dumps(definition | {"added_tokens": harmless}))
        self.control_ids = frozenset(token["id"] for token in added) - {token["id"] for token in harmless}
        unknown = definition["model"].get("unk_token")
        self._unknown_id: int | None = self._scaffold.token_to_id(unknown) if unknown else None
        self.size: int = self._scaffold.get_vocab_size(with_added_tokens=True)  # ids that mean something
        self.longest = max(_LEAST_LONGEST, *map(len, self._outside.get_vocab()))  # characters that one token says

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Raises TemplateError if the folder has no tokenizer that can be read."""
        file = folder / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8") if file.exists() else _converted(folder)
            return cls(json.loads(text))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise TemplateError(f"{folder} holds no tokenizer that can be read: {error}") from error

    def scaffold(self, text: str) -> list[int]:
        return self._scaffold.encode(text, add_special_tokens=False).ids

    def outside(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates come from hostile output
        ids = self._outside.encode(text, add_special_tokens=False).ids
        if self.control_ids.isdisjoint(ids):
            return ids
        # A tokenizer whose plain vocabulary holds its control tokens as words reads them there: unknown words are
        # the honest reading, and where there is no such token, nothing is.
        allowed = [token for token in ids if token not in self.control_ids or token == self._unknown_id]
        if self._unknown_id is None:
            return allowed
        return [self._unknown_id if token in self.control_ids else token for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids; such as the tokenizer does not know are skipped."""
        return self._scaffold.decode([i for i in ids if 0 <= i < self.size], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._scaffold.token_to_id(token)


def _converted(folder: Path) -> str:
    """The tokenizer.json that transformers makes of an older kind of tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer.backend_tokenizer.to_str()


def _without_prefix_space(part: Any) -> Any:
    """Pieces of one text are encoded one by one, so none may get a blank put before it."""
    if isinstance(part, list):
        return [_without_prefix_space(item) for item in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _without_prefix_space(value) if key != "vocab" else value for key, value in part.items()}
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel" and "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    if part.get("type") == "Sequence" and isinstance(changed.get("normalizers"), list):
        changed["normalizers"] = [item for item in changed["normalizers"] if item.get("type") != "Prepend"]
    return changed
