"""The checker that the suite puts around every function of ours (pytest option `--jaxtyping-packages`).

As in PEP 484, an int is welcome where a float is annotated; beartype refuses that unless told otherwise.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
