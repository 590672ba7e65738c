"""JSON as RFC 8259 has it: it knows no NaN and no infinities, which Python writes by name all the same."""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any


def valid_json(value: Any, **options: Any) -> str:
    """Return a value as JSON, with null for each number that is none.

    Args:
        value: mappings, sequences and what else JSON holds.
        options: as for `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
