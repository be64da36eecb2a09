"""Which rows and which samples are worth learning from: filters, difficulty, curricula and the command `select`.

No jax in here. Samples are written by `sample`, judged by `verify`, and what is left goes to `train` or `sft`.
"""
