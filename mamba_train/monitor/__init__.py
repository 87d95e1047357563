"""What a run shows and records: metric sinks, progress, FLOP counts, SSM health and the report.

Nothing is imported here, so that `mamba-train report` does not pay for importing torch or wandb.
"""
