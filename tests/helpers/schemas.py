"""Schemas and tools as programs send them, which structured answers of two models must fit.

All are finite, so that a model of any quality reaches the end: strings and arrays have a largest length.
"""

from typing import Any

Schema = dict[str, Any]

SHORT: Schema = {"type": "string", "minLength": 1, "maxLength": 8}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 99}
FLAG: Schema = {"type": "boolean"}


def record(properties: dict[str, Schema], *optional: str, **more: Any) -> Schema:
    """The schema of an object that has these properties and no others."""
    required = [name for name in properties if name not in optional]
    fields = {"type": "object", "properties": properties, "required": required}
    return fields | {"additionalProperties": False} | more


def items(schema: Schema, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": schema, "minItems": least, "maxItems": most}


def pattern(regex: str) -> Schema:
    return {"type": "string", "pattern": regex}


CLOCK = pattern("^([01][0-9]|2[0-3]):[0-5][0-9]$")
"""Used instead of `"format": "time"`, in which fractions of a second may be endless."""

SCALARS: list[Schema] = [
    SHORT,
    SMALL,
    FLAG,
    {"type": "null"},
    {"const": "fixed"},
    {"const": 7},
    {"enum": ["low", "mid", "high"]},
    {"enum": [1, 2, 3]},
    {"enum": ["a", 1, True, None]},
    {"type": ["string", "null"], "maxLength": 8},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "maxLength": 0},
]

STRINGS: list[Schema] = [
    pattern("^[A-Z]{3}-[0-9]{4}$"),
    pattern("^[0-9]{5}(-[0-9]{4})?$"),
    pattern("^(red|green|blue)$"),
    pattern("^#[0-9a-f]{6}$"),
    pattern("^[a-z]{2,8}@[a-z]{2,8}\\.(com|org)$"),
    pattern("^\\+[0-9]{2} [0-9]{3} [0-9]{4}$"),
    pattern("^v[0-9]\\.[0-9]\\.[0-9]$"),
    pattern("^[ÄÖÜäöüß]{1,4}$"),
    pattern("^(yes|no)$"),
    {"type": "string", "format": "date"},
    CLOCK,
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"enum": ["größer", "kleiner", "日本", "emoji 😀"]},
    {"enum": ['quote "inside"', "back\\slash", "line\nbreak", "tab\there"]},
]

ARRAYS: list[Schema] = [
    items(SHORT),
    items(SMALL, 1, 4),
    items(FLAG, 3, 3),
    items({"enum": ["x", "y"]}, 2, 2),
    items(items(SMALL, 1, 2), 1, 2),
    items(record({"id": SMALL}), 1, 2),
    items({"anyOf": [SMALL, SHORT]}, 1, 3),
    {"type": "array", "prefixItems": [SHORT, SMALL], "items": False, "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [FLAG], "items": SMALL, "minItems": 1, "maxItems": 3},
    {"type": "array", "maxItems": 0},
]

OBJECTS: list[Schema] = [
    record({}),
    record({"name": SHORT}),
    record({"name": SHORT, "age": SMALL}),
    record({"name": SHORT, "age": SMALL}, "age"),
    record({"a": SMALL, "b": SMALL, "c": SMALL}, "a", "b", "c"),
    record({"first": SHORT, "last": SHORT, "born": {"type": "string", "format": "date"}}),
    record({"street": SHORT, "city": SHORT, "zip": pattern("^[0-9]{5}$")}),
    record(
        {
            "lat": {"type": "integer", "minimum": -90, "maximum": 90},
            "lon": {"type": "integer", "minimum": -180, "maximum": 180},
        }
    ),
    record({"größe": SMALL, "straße": SHORT}),
    record({"名前": SHORT}),
    record({"a key with spaces": SMALL, "key-with-dashes": FLAG}),
    record({'quoted "key"': FLAG}),
    record({"tags": items({"enum": ["red", "green", "blue"]}, 1, 3)}),
    record({"on": FLAG, "off": {"const": False}}),
    record({"value": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}}),
    record({"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}}),
    record({"outer": record({"inner": record({"deep": record({"deeper": SMALL})})})}),
    record({"people": items(record({"name": SHORT, "age": SMALL}), 1, 2)}),
    record({"matrix": items(items(SMALL, 2, 2), 2, 2)}),
    record({"config": record({"debug": FLAG, "level": {"enum": ["info", "warn"]}}, "debug")}),
    {
        "type": "object",
        "propertyNames": pattern("^[A-Z]{2}$"),
        "additionalProperties": FLAG,
        "maxProperties": 1,
    },
    record({"a": SMALL, "b": items(record({"c": SHORT}, "c"), 0, 1)}, "b"),
    {
        "type": "object",
        "patternProperties": {"^[a-z]{1,3}$": SMALL},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {
        "type": "object",
        "propertyNames": pattern("^[a-z]{1,4}$"),
        "additionalProperties": SMALL,
        "maxProperties": 2,
    },
    record({f"field{i}": SMALL for i in range(8)}),
    record({"score": {"type": "number", "minimum": 0, "maximum": 10}, "passed": FLAG}),
    record({"minimum": SMALL, "type": SHORT, "properties": FLAG}),
]

CHOICES: list[Schema] = [
    {"anyOf": [SMALL, SHORT]},
    {"anyOf": [record({"cat": SHORT}), record({"dog": SHORT})]},
    {"oneOf": [record({"kind": {"const": "a"}, "x": SMALL}), record({"kind": {"const": "b"}, "y": SHORT})]},
    {"anyOf": [{"type": "null"}, record({"value": SMALL})]},
    {"anyOf": [items(SMALL, 1, 2), SMALL]},
    record({"id": {"anyOf": [SMALL, {"type": "null"}]}}),
    record({"result": {"anyOf": [record({"ok": SHORT}), record({"error": SHORT, "code": SMALL})]}}),
    record({"shape": {"oneOf": [record({"radius": SMALL}), record({"width": SMALL, "height": SMALL})]}}),
    {"allOf": [record({"only": SMALL})]},
    record({"either": {"enum": ["x", None, 3]}}),
]

REFERENCES: list[Schema] = [
    record({"a": {"$ref": "#/$defs/small"}, "b": {"$ref": "#/$defs/small"}}, **{"$defs": {"small": SMALL}}),
    record(
        {"home": {"$ref": "#/$defs/place"}, "work": {"$ref": "#/$defs/place"}},
        **{"$defs": {"place": record({"city": SHORT})}},
    ),
    {"$ref": "#/$defs/root", "$defs": {"root": record({"x": SMALL})}},
    record(
        {"points": items({"$ref": "#/$defs/point"}, 1, 2)},
        **{"$defs": {"point": record({"x": SMALL, "y": SMALL})}},
    ),
    items({"$ref": "#/definitions/word"}, 1, 2) | {"definitions": {"word": SHORT}},
    record({"level": {"$ref": "#/$defs/level"}}, **{"$defs": {"level": {"enum": ["low", "high"]}}}),
    record(
        {"outer": {"$ref": "#/$defs/outer"}},
        **{"$defs": {"outer": record({"inner": {"$ref": "#/$defs/inner"}}), "inner": record({"n": SMALL})}},
    ),
    record(
        {
            "pair": {
                "type": "array",
                "prefixItems": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}],
                "items": False,
                "minItems": 2,
                "maxItems": 2,
            }
        },
        **{"$defs": {"n": SMALL}},
    ),
]

REAL: list[Schema] = [
    record(
        {"sentiment": {"enum": ["positive", "neutral", "negative"]}, "confidence": {"enum": ["low", "high"]}}
    ),
    record({"answer": SHORT, "sources": items(SHORT, 0, 2)}),
    record({"title": SHORT, "author": SHORT, "year": {"type": "integer", "minimum": 1500, "maximum": 2100}}),
    record({"amount": SMALL, "currency": {"enum": ["EUR", "USD", "CHF"]}, "paid": FLAG}),
    record({"entities": items(record({"text": SHORT, "label": {"enum": ["PER", "LOC", "ORG"]}}), 1, 2)}),
    record({"steps": items(record({"thought": SHORT}), 1, 2), "final": SHORT}),
    record({"is_spam": FLAG, "reason": SHORT}),
    record({"language": {"enum": ["de", "en", "fr"]}, "translation": SHORT}),
    record(
        {
            "order": record(
                {
                    "id": pattern("^ORD-[0-9]{3}$"),
                    "lines": items(record({"sku": SHORT, "count": SMALL}), 1, 2),
                }
            )
        }
    ),
    record(
        {
            "start": CLOCK,
            "end": CLOCK,
            "room": SHORT,
        }
    ),
    record({"sql": pattern("^SELECT [a-z]{1,8} FROM [a-z]{1,8};$")}),
    record({"plan": {"enum": ["free", "pro"]}, "seats": SMALL, "trial": {"type": ["boolean", "null"]}}),
    record(
        {
            "from": SHORT,
            "to": SHORT,
            "date": {"type": "string", "format": "date"},
            "return": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        }
    ),
    record(
        {
            "labels": {
                "type": "object",
                "propertyNames": pattern("^[a-z]{1,6}$"),
                "additionalProperties": SHORT,
                "maxProperties": 2,
            },
            "open": FLAG,
        }
    ),
    record({"version": {"const": 1}, "data": {"anyOf": [record({"n": SMALL}), record({"s": SHORT})]}}),
]

SCHEMAS: list[Schema] = [*SCALARS, *STRINGS, *ARRAYS, *OBJECTS, *CHOICES, *REFERENCES, *REAL]
"""All schemas, one hundred."""


def tool(name: str, parameters: Schema) -> dict[str, Any]:
    """A tool as OpenAI's clients send it; vLLM holds only strict ones to their schema."""
    function = {"name": name, "description": f"Calls {name}.", "parameters": parameters, "strict": True}
    return {"type": "function", "function": function}


_PARAMETERS: list[Schema] = [schema for schema in [*OBJECTS, *REFERENCES, *REAL] if "properties" in schema]
TOOLS: list[dict[str, Any]] = [
    tool(f"tool_{number}", schema) for number, schema in enumerate(_PARAMETERS)
] + [
    tool(f"{verb}_{noun}", record({noun: SHORT, "count": SMALL}))
    for verb, noun in (("get", "item"), ("get", "user"), ("set", "item"), ("set", "user"), ("find", "place"))
]
