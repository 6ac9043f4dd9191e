"""Tools as a grammar: which of a request's tools may be called, and the schema of one call.

A call is the JSON object {"name": <one tool's name>, "arguments": <what its parameters allow>}. Where several calls are
allowed, the answer is one such object or a list of them.
"""

from __future__ import annotations

from typing import Any

from textgen_engine.errors import ToolError
from textgen_engine.grammar.json_schema import map_children

# With tool_choice auto the answer is either calls or plain text; a text that opens a brace, or a bracket and a brace,
# is calls.
PLAIN_TEXT_PATTERN = r"([^{\[\s](?s:.)*|\[([^{\s](?s:.)*)?)"

# More calls than that in one answer are a model that does not come to an end.
_MAX_CALLS = 16


def select_tools(tools: list[Any], choice: Any, parallel: Any = None) -> dict[str, Any] | None:
    """{"mode": "required" | "auto", "tools": [{"name", "parameters"}]}, and "parallel": true where several calls are
    allowed; None where no tool may be called.

    choice: "auto", "required" (or "any"), "none", a tool's name, or OpenAI's {type: function, function: {name}}.
    parallel: whether several calls are allowed; a choice that names a tool is of one call. Raises ToolError for a
    malformed tool, a name given twice, and a choice that names no tool.
    """
    if parallel not in (None, True, False):
        raise ToolError("`parallel_tool_calls` must be true or false")
    named = [_name_and_parameters(tool, index) for index, tool in enumerate(tools)]
    names = [tool["name"] for tool in named]
    for name in names:
        if names.count(name) > 1:
            raise ToolError(f"two tools are called {name!r:.100}")
    if isinstance(choice, dict):
        function = choice.get("function", choice)
        choice_name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(choice_name, str):
            raise ToolError("`tool_choice` must name a function: {type: function, function: {name}}")
        if choice_name not in names:
            raise ToolError(f"`tool_choice` names no tool of the request: {choice_name!r:.100}")
        return {"mode": "required", "tools": [tool for tool in named if tool["name"] == choice_name]}
    if choice is None or choice == "none":
        return None
    if not isinstance(choice, str):
        raise ToolError("`tool_choice` must be auto, required, none or a function")
    if choice in names:
        return {"mode": "required", "tools": [tool for tool in named if tool["name"] == choice]}
    if choice in ("auto", "required", "any"):
        if not named:
            raise ToolError("`tools` is empty")
        selected = {"mode": "auto" if choice == "auto" else "required", "tools": named}
        return {**selected, "parallel": True} if parallel else selected
    raise ToolError(f"`tool_choice` names no tool of the request: {choice!r:.100}")


def tool_call_schema(tools: list[dict[str, Any]], parallel: bool = False) -> dict[str, Any]:
    """The schema of one call of one of `tools` ({"name", "parameters"} each); parallel: or of a list of calls.

    Each tool's parameters stand whole under the root's `$defs`, and their own "#/..." references are re-pointed there:
    no backend then has to follow a reference through an array.
    """
    branches: list[Any] = []
    definitions: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        place = f"tool_{index}"
        parameters = tool["parameters"]
        if isinstance(parameters, dict):
            parameters = {key: value for key, value in parameters.items() if key not in ("$schema", "$id", "id")}
        definitions[place] = _move_references(parameters, f"#/$defs/{place}")
        branches.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    if parallel:
        call = branches[0] if len(branches) == 1 else {"anyOf": branches}
        branches = [*branches, {"type": "array", "items": call, "minItems": 1, "maxItems": _MAX_CALLS}]
    root: dict[str, Any] = branches[0] if len(branches) == 1 else {"anyOf": branches}
    return {**root, "$defs": definitions}


def _name_and_parameters(tool: Any, index: int) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ToolError(f"tool {index} has no function name")
    parameters = function.get("parameters", function.get("arguments"))
    if parameters is None or parameters == {}:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise ToolError(f"tool {function['name']!r:.100}: parameters must be a JSON schema object")
    return {"name": function["name"], "parameters": parameters}


def _move_references(schema: Any, base: str) -> Any:
    """`schema` with each local reference "#..." re-pointed under `base`."""
    if not isinstance(schema, dict):
        return schema
    moved = map_children(schema, lambda inner: _move_references(inner, base))
    for key in ("$ref", "$dynamicRef"):
        target = moved.get(key)
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            moved[key] = base + target[1:]
    return moved
