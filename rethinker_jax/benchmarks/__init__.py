"""Benchmarks: published rows → items → (generations) → numbers with intervals. Imports no jax."""
