"""How good a model is, and what it must beat."""
