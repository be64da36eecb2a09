"""The verifier: extract the answer, compare it with the gold, say why. Nothing in this package imports jax.

`judge.judge` is the pure function, `pool.VerifierPool` runs it in worker processes under limits, `rewards` turns a
verdict into a number, `command.verify_file` is the command line's part. What counts as correct is written in `judge`.
"""
