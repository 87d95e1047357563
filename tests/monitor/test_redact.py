"""Credentials are replaced, look-alikes of this project's config are not."""

import dataclasses

import pytest

from mamba_train.config import Config
from mamba_train.monitor.redact import redact_credentials


@pytest.mark.parametrize(
    "key",
    ["api_key", "apikey", "WANDB_API_KEY", "token", "hf_token", "password", "secret", "aws_secret_access_key"],
)
def test_values_under_credential_keys_are_replaced_at_any_depth(key: str) -> None:
    config = {"a": {key: "hunter2"}, "b": [{key: "hunter2"}], key: ["hunter2"]}
    assert "hunter2" not in str(redact_credentials(config))


def test_users_in_urls_are_replaced() -> None:
    cleaned = redact_credentials({"data": {"path": "https://me:hunter2@host.example/x?y=a@b"}})
    assert cleaned == {"data": {"path": "https://***@host.example/x?y=a@b"}}


def test_every_key_of_the_schema_survives() -> None:
    def keys(value: object, prefix: str = "") -> list[str]:
        if not dataclasses.is_dataclass(value):
            return [prefix]
        fields = dataclasses.fields(value)
        return [k for f in fields for k in keys(getattr(value, f.name, None), f.name)]

    config = dict.fromkeys([*keys(Config()), "subtoken", "n_tokens", "token_count"], "kept")
    assert "tokenizer" in config
    assert redact_credentials(config) == config
    assert redact_credentials({"token": None}) == {"token": None}
