"""Recipes of several stages, from the base model to the last one: read, planned, counted, run and gone on with."""

from rethinker_jax.pipeline.budget import dry_run
from rethinker_jax.pipeline.run import run_pipeline

__all__ = ["dry_run", "run_pipeline"]
