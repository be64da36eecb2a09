"""Supervised fine-tuning on completions: rows → prompts and target tokens → the same update as RL, with an NLL loss."""

from rethinker_jax.sft.loop import fine_tune

__all__ = ["fine_tune"]
