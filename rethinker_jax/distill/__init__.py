"""Caption → text reasoner: a model describes the images, another one reasons about the descriptions. `main distill`.

The first round of OpenVLThinker. A model that is asked over HTTP needs no jax; our sampler is in `local`.
"""
