"""The tokenizer of a tiny model: the words of its demonstrations, and the tokens of turns and calls.

Owns which words get a token. Must never know an environment's rules or a model. Law: the tokens of turns and calls
are no words, so no text can spell them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentgym.messages import ToolSpec

UNKNOWN, END, PAD = "<unk>", "<end>", "<pad>"
CONTROL_TOKENS = (PAD, END, "<tools>", "<system>", "<user>", "<assistant>", "<tool>", "<call>", "<sep>")

# An action `<call> move up <end>` is four tokens; nothing else is closed, because the next role token says so.
CHAT_TEMPLATE = """
{%- if tools %}{{- '<tools>' }}{% for tool in tools %}{{- ' ' + tool.function.name }}{% endfor %}{% endif %}
{%- for message in messages %}
    {{- ' <' + message.role + '> ' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<call> ' if loop.first and not message.content else ' <call> ' }}
        {{- call.function.name }}
        {%- if call.function.arguments is string %}
            {{- ' ' + call.function.arguments }}
        {%- else %}
            {%- for value in call.function.arguments.values() %}
                {{- ' ' if loop.first else ' <sep> ' }}{{- value }}
            {%- endfor %}
        {%- endif %}
    {%- endfor %}
    {%- if message.role == 'assistant' %}{{- ' <end>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' <assistant> ' }}{% endif %}
"""

_RARE_SHARE = 0.001  # above it the words are an open class (code, free text) and are spelled where they are rare
_RARE_COUNT = 10
_MAX_WORDS = 2000
_MAX_RANGE = 1000  # integers of a parameter's bounds that get a token each


def words_of_tools(tools: Sequence[ToolSpec]) -> set[str]:
    """The words a call may need even if no demonstration said them: names, choices, bounded integers."""
    words: set[str] = set()
    for tool in tools:
        words.add(tool.name)
        for schema in (tool.parameters.get("properties") or {}).values():
            words.update(_words_of_schema(schema))
    return words


def _words_of_schema(schema: Mapping[str, Any]) -> Iterable[str]:
    for value in schema.get("enum", ()):
        yield from str(value).split()
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema.get("type") == "integer" and low is not None and high is not None and high - low < _MAX_RANGE:
        yield from map(str, range(int(low), int(high) + 1))
    if schema.get("type") == "boolean":
        yield from ("true", "false")
    for choice in schema.get("anyOf", ()):
        yield from _words_of_schema(choice)


def write_tokenizer(folder: Path, texts: Counter[str], tools: Sequence[ToolSpec]) -> int:
    """Writes the files that transformers and the renderer load, and returns the number of tokens.

    `texts` counts how often each text was said. Where (almost) every word comes often, each word is a token and any
    other word is unknown; otherwise rare words are spelled by their letters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = _vocabulary(texts, words_of_tools(tools))
    ids = {word: i for i, word in enumerate([UNKNOWN, *vocabulary])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=200))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _vocabulary(texts: Counter[str], always: set[str]) -> list[str]:
    counts: Counter[str] = Counter()
    for text, count in texts.items():
        for word in text.split():
            counts[word] += count
    always = {word for word in always if len(word.split()) == 1}
    rare = sum(count for word, count in counts.items() if count < _RARE_COUNT and word not in always)
    if rare <= _RARE_SHARE * max(1, counts.total()):
        words, letters = always | set(counts), set[str]()
    else:
        common = [word for word, count in counts.most_common(_MAX_WORDS) if count >= _RARE_COUNT]
        words = always | set(common)
        letters = {letter for word in counts for letter in word}
    reserved = {UNKNOWN, *CONTROL_TOKENS}
    spelled = letters | {f"##{letter}" for letter in letters}
    return sorted((words | spelled) - reserved, key=_natural)


def _natural(word: str) -> tuple[int, str]:
    return (int(word) if re.fullmatch(r"\d{1,9}", word) else -1, word)
