"""Runs on a SLURM cluster: `python -m slurm.submit` and `python -m slurm.status`. No training logic."""
