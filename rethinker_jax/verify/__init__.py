"""The verifier: extract the answer, compare it with the gold, say why. Nothing in this package imports jax.

`judge.judge` is the pure function, `pool.VerifierPool` runs it in worker processes under limits, `command.verify_file`
is the command line's part. What counts as correct is written in `judge`; what it earns is the package `rewards`.
"""
