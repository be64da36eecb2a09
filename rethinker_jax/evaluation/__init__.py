"""The command `evaluate`: a model over a benchmark → judged generations → numbers. Only what draws imports jax.

    items → (protocol) → prompts → completions → records, judged while others are drawn → FILE.json, and .html

`command` draws, `regrade` judges again and joins shards, `results` writes, `judging` judges, in several processes
`shared`; `perplexity` scores.
"""
