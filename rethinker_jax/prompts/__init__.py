"""Rows → problems → prompts: what the model sees, made in numpy on the host. Imports no jax and no torch."""
