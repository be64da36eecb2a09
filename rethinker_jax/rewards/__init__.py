"""What a response earns: terms, the functions of your own, the judge model, and their weighted sum. No jax here.

A built-in term is a pure function of `inputs.RewardInput`; `terms.TERMS` names them all. `user` runs functions of your
own in a process, `judge_model` asks a model over HTTP, and `scorer.Scorer` is the one object that the loop knows.
"""
