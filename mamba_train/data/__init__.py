"""From text to batches: documents, tokenizer, token shards, and an order that is a pure function.

The way of a token: `documents` (text) -> `tokenizer` -> `shards` (Megatron `.bin`/`.idx`, described by a
`manifest`) -> `corpus` -> `mixture` and `order` -> `batches` -> `loader`. Everything up to `order` works without
torch, so that a mistake in the data is reported before torch is imported.
"""
