"""Names and JSON values of request parameters -> `RequestParameters`, all checked, once, before anything is queued.

    values.py   how one value is read, by its kind; the server's limits
    table.py    every name: aliases, kind, range, documentation (docs/parameters.md is generated from it)
    parse.py    a whole request: looks names up, reads values, checks what goes together

Knows no tokenizer, no model and no Triton.
"""

from textgen_engine.parameters.parse import RequestParameters, parse_parameters
from textgen_engine.parameters.table import PARAMETERS, Parameter, ParameterGroup
from textgen_engine.parameters.values import ParameterLimits

__all__ = ["PARAMETERS", "Parameter", "ParameterGroup", "ParameterLimits", "RequestParameters", "parse_parameters"]
