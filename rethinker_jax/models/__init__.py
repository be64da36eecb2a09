"""Qwen2.5-VL in Flax NNX: modules define, pytrees work. One model function serves the sampler and the trainer."""
