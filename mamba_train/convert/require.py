"""Take keys out of a foreign config, and refuse what is not understood."""

from collections.abc import Mapping
from typing import Any


def require(values: dict[str, Any], prefix: str = "", **expected: Any) -> None:
    """Take the keys out of `values`; raise ValueError unless each has its expected value or is absent."""
    for key, wanted in expected.items():
        value = values.pop(key, wanted)
        if value != wanted:
            raise ValueError(f"{prefix}{key}={value} cannot be imported; expected {wanted}")


def refuse_rest(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError for a key that is left over."""
    for key, value in values.items():
        raise ValueError(f"{prefix}{key}={value}: this key is not known here, so what it changes cannot be computed")
