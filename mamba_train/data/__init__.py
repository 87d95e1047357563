"""From text to batches: documents, tokenizer, token shards, and an order that is a pure function.

The way of a token: `documents` (text) -> `tokenizer` -> `shards` (Megatron `.bin`/`.idx`, described by a
`manifest`) -> `corpus` -> `mixture` and `order` -> `batches` -> `loader`. Everything up to `order` works without
torch, so that a mistake in the data is reported before torch is imported.

Text that streams goes another way: `stream_opening` (files) -> `lanes` -> `lane_reader` -> `streams` ->
`stream_loader`; with `cached_shards` by way of shards after all.
"""
