"""From raw text to verified token shards: `python -m data_prep COMMAND` (docs/data.md)."""
