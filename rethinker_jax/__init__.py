"""rethinker_jax: reinforcement learning that teaches Qwen2.5-VL to reason and to check itself, in JAX."""

__version__ = "0.1.0"
