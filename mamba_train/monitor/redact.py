"""Credentials must not reach anything that is shown, saved or sent."""

import re
from collections.abc import Mapping
from typing import Any

_CREDENTIAL_KEY = re.compile(
    r"(^|[_.-])(api_?key|access_?key|secret|secret_?key|token|password|passwd|credentials?)$", re.IGNORECASE
)
_URL_USER = re.compile(r"(?<=://)[^/@\s]+@")


def names_credential(name: str) -> bool:
    """Whether a key or a variable of this name holds a credential."""
    return _CREDENTIAL_KEY.search(name) is not None


def redact_credentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a nested config with values under credential-like keys, and users in URLs, replaced by `***`."""

    def clean(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): clean(str(name), item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(key, item) for item in value]
        if names_credential(key) and value not in (None, ""):
            return "***"
        return _URL_USER.sub("***@", value) if isinstance(value, str) else value

    return {str(key): clean(str(key), value) for key, value in config.items()}
