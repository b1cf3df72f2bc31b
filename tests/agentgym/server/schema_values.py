"""Values for hypothesis: whatever JSON can say, what often goes wrong, and what an OpenAPI schema allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
hostile_values = st.sampled_from(
    [None, -1, 0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1e308, -0.0, "", "\x00", "\ud7ff\ue000", "a" * 3000, [],
     {}, [[]], [None], [-1], [2**70], {"": ""}, {"role": "user"}, [{"role": "user", "content": None}], True]
)  # fmt: skip


def from_schema(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that an OpenAPI schema allows; an error for a word of JSON schema that is not read here."""
    known = {"title", "description", "default", "type", "anyOf", "enum", "const", "$ref", "properties", "required"}
    known |= {"additionalProperties", "propertyNames", "items", "maxItems", "minItems", "minLength", "maxLength"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxProperties"}
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        return from_schema(components[schema["$ref"].rpartition("/")[2]], components)
    if "anyOf" in schema:
        return st.one_of([from_schema(one, components) for one in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        return objects(schema, components)
    if kind == "array":
        items = from_schema(schema.get("items", {}), components)
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=min(schema.get("maxItems", 4), 4))
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 40), 40))
    if kind in ("integer", "number"):
        return numbers(schema, kind)
    return {"boolean": st.booleans(), "null": st.none(), None: json_values}[kind]


def objects(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    strategies = {name: from_schema(one, components) for name, one in schema.get("properties", {}).items()}
    required = {name: one for name, one in strategies.items() if name in schema.get("required", ())}
    fixed = st.fixed_dictionaries(required, optional={n: one for n, one in strategies.items() if n not in required})
    more = schema.get("additionalProperties", True)
    if more is False:
        return fixed
    values = from_schema(more, components) if isinstance(more, dict) else json_values
    others = st.dictionaries(st.text(min_size=1, max_size=6).map("x-".__add__), values, max_size=2)
    return fixed if strategies else others


def numbers(schema: dict[str, Any], kind: str) -> st.SearchStrategy[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if kind == "integer":  # the bounds of a schema are floats, in which 2**64 - 1 does not exist
        below = None if high is None else int(high) - ("exclusiveMaximum" in schema)
        return st.integers(None if low is None else int(low), below)
    return st.floats(
        low, high, exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema,
        allow_nan=False, allow_infinity=False,
    ) | st.integers(0, 2).filter(lambda value: (low or 0) < value)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))
