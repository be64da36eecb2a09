"""The embedded example: small picture problems, their worked solutions, a tokenizer and a model shape. Imports no jax.

render (pictures) → solutions (texts) → tasks (problems) → dataset (files and fine-tuning examples)
tokenizer → model_config (a model directory without weights)
"""
