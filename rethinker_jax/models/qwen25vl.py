"""The whole model, and the one way in which it is used: an immutable definition, and parameters as a plain pytree.

    model = define_model(config)          # no arrays
    params = load_params(...)             # nested dictionary of arrays (`models/weights.py`)
    hidden = model.hidden(params, text, model.encode_images(params, vision))

`text` and `vision` are the array dataclasses of `prompts/batch.py` and `prompts/windows.py`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rethinker_jax.models.attention import Mask
from rethinker_jax.models.attention_kernels import PLAIN, Attention
from rethinker_jax.models.gather import Take, take_whole
from rethinker_jax.models.layers import Remat, recomputed
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.rope import text_angles
from rethinker_jax.models.text import Attend, TextDecoder
from rethinker_jax.models.vision import VisionTower
from rethinker_jax.prompts.batch import PromptBatch, TextBatch
from rethinker_jax.prompts.windows import VisionBatch

# The host's batches are jax's too: the package that makes them imports no jax.
for _batch in (TextBatch, VisionBatch, PromptBatch):
    jax.tree_util.register_dataclass(_batch, [field.name for field in dataclasses.fields(_batch)], [])

Params = dict[str, Any]


class Qwen25VL(nnx.Module):
    def __init__(self, config: QwenConfig, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, rngs)
        self.text = TextDecoder(config, rngs)


@dataclasses.dataclass(frozen=True)
class Model:
    """Definition without arrays; hashable, so it may be a static argument of a jitted function.

    mesh: that on which it is trained, where we say ourselves how work is cut over rows; None = one device.
    """

    config: QwenConfig
    vision: nnx.GraphDef
    layer: nnx.GraphDef
    norm: nnx.GraphDef
    remat: Remat = "none"
    attention: Attention = PLAIN
    mesh: Mesh | None = None

    def __hash__(self) -> int:
        return hash((self.config, self.remat))  # the graphs follow from the config, and take half a millisecond to hash

    def encode_images(self, params: Params, vision: VisionBatch) -> Float[Array, "merged d_model"]:
        """Merged image tokens, as a table that `image_index` points into."""
        tower: VisionTower = nnx.merge(self.vision, params["vision"])
        return tower(vision.patches, vision.hw, vision.segment, vision.valid, self.attention, self.remat)

    def embed(
        self,
        params: Params,
        token_ids: Int[Array, "batch seq"],
        image_index: Int[Array, "batch seq"] | None = None,
        image_table: Float[Array, "merged d_model"] | None = None,
        take: Take = take_whole,
    ) -> Float[Array, "batch seq d_model"]:
        """Token embeddings, with image tokens (image_index ≥ 0) taken from `image_table`.

        take: the way to a table's rows, where it lies in parts.
        """
        x = take(params["text"]["embedding"], token_ids, ("vocab", "d_model"))
        if image_table is None or image_index is None:
            return x
        images = take(image_table, jnp.maximum(image_index, 0), ("images", "d_model")).astype(x.dtype)
        return jnp.where(image_index[..., None] >= 0, images, x)

    def angles(self, positions: Int[Array, "3 batch seq"]) -> Float[Array, "batch seq half"]:
        return text_angles(positions, self.config.head_dim, self.config.rope_theta, self.config.mrope_section)

    def run_layers(
        self, layers: Params | Sequence[Params], x: jax.Array, angles: jax.Array, attend: Attend, caches: Any = None
    ) -> tuple[Float[Array, "batch seq d_model"], Any]:
        """Run the decoder layers: a scan over stacked parameters, or a plain loop over a list of them.

        `caches` is stacked or a list likewise; what `attend` returns as cache comes back in the same form.
        """

        def layer(x: jax.Array, inputs: tuple[Params, Any]) -> tuple[jax.Array, Any]:
            return nnx.merge(self.layer, inputs[0])(x, angles, attend, inputs[1])

        if isinstance(layers, dict):
            return jax.lax.scan(recomputed(layer, self.remat), x, (layers, caches))
        new_caches = []
        for params, cache in zip(layers, caches if caches is not None else [None] * len(layers), strict=True):
            x, cache = layer(x, (params, cache))
            new_caches.append(cache)
        return x, new_caches

    def hidden(
        self, params: Params, text: TextBatch, image_table: jax.Array | None
    ) -> Float[Array, "batch seq d_model"]:
        """Final hidden states (before the last norm) of right-padded rows; the teacher-forced pass."""
        x = self.embed(params, text.token_ids, text.image_index, image_table)
        attend = functools.partial(causal_attend, self.attention, text.lengths)
        return self.run_layers(params["text"]["layers"], x, self.angles(text.positions), attend)[0]

    def logits(self, params: Params, hidden: Float[Array, "*rows d_model"]) -> Float[Array, "*rows vocab"]:
        """Float32 logits of final hidden states; a tied head is the embedding."""
        text = params["text"]
        x = nnx.merge(self.norm, text["norm"])(hidden)
        if "head" in text:
            return jnp.einsum("...D,DV->...V", x, text["head"]["kernel"], preferred_element_type=jnp.float32)
        return jnp.einsum("...D,VD->...V", x, text["embedding"], preferred_element_type=jnp.float32)


def causal_attend(
    attention: Attention,
    lengths: Int[Array, " batch"],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """Causal attention inside right-padded rows of `lengths` tokens."""
    return attention(query, key, value, Mask(causal=True, lengths=lengths)), cache


def define_model(
    config: QwenConfig, remat: Remat = "none", attention: Attention = PLAIN, mesh: Mesh | None = None
) -> Model:
    abstract = nnx.eval_shape(lambda: Qwen25VL(config, nnx.Rngs(0)))
    parts = abstract.vision, abstract.text.layers, abstract.text.norm
    return Model(config, *[nnx.graphdef(part) for part in parts], remat, attention, mesh)


def param_shapes(config: QwenConfig) -> Params:
    """Nested dictionary of `jax.ShapeDtypeStruct`, float32: what `load_params` will return."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Qwen25VL(config, nnx.Rngs(0)))))


def param_dims(config: QwenConfig) -> Params:
    """Nested dictionary of dimension words, one tuple per parameter, of the same structure as the parameters."""
    state = nnx.state(nnx.eval_shape(lambda: Qwen25VL(config, nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    return nnx.traversals.unflatten_mapping({path: variable.get_metadata()["dims"] for path, variable in flat})


@functools.cache
def head_dims(config: QwenConfig) -> Params:
    """The dimension words of what `Model.logits` reads, in a dictionary of its own."""
    text = param_dims(config)["text"]
    head = "embedding" if config.tied else "head"
    return {"text": {key: text[key] for key in ("norm", head)}}


def init_params(config: QwenConfig, seed: int, shardings: Params | None = None) -> Params:
    """Random float32 parameters, the same wherever they lie; with `shardings`, each device draws its own pieces.

    Norm scales are 1, biases 0, embeddings of standard deviation 0.02 and all else of fan_in^-1/2; projections back
    into the residual stream are scaled down by sqrt(2 · layers).
    """
    # XLA's CPU backend takes a second to compile one draw of three dimensions, and a fifth of that at its first level.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    draw = jax.jit(_draw_params, static_argnums=0, out_shardings=shardings, compiler_options=options)
    return draw(config, np.uint32(seed & 0xFFFFFFFF))


def _draw_params(config: QwenConfig, seed: jax.Array) -> Params:
    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = tuple(step.key for step in path)
        if names[-1] == "scale" or names[-1].endswith("bias"):
            return jnp.full(leaf.shape, float(names[-1] == "scale"), jnp.float32)
        # A parameter's name is half of its key, so that no draw hangs on what else there is.
        key = jax.random.wrap_key_data(jnp.stack([seed, np.uint32(zlib.crc32("/".join(names).encode()))]))
        return jax.random.normal(key, leaf.shape, jnp.float32) * _init_std(names, leaf.shape, config)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))


def _init_std(names: tuple[str, ...], shape: tuple[int, ...], config: QwenConfig) -> float:
    if names[-1] == "embedding":
        return 0.02
    if names[-1] == "output":
        fan_in = shape[-3] * shape[-2]
    else:
        fan_in = shape[-3 if names[-2] in ("query", "key", "value") else -2]
    depth = config.vision.depth if names[0] == "vision" else config.layers
    residual = names[-1] == "output" or names[-2] == "down"
    return fan_in**-0.5 * ((2 * depth) ** -0.5 if residual else 1.0)
