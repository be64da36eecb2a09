"""Which tensor of a Hugging Face checkpoint is which parameter of ours, and how its axes are turned.

A Hugging Face tensor is cut into `part`s along its rows (the fused vision qkv has three), seen with the shape `view`,
and its axes are permuted by `perm` into ours. Both directions, and reading slices, follow from the same table.
"""

import dataclasses
import re

from rethinker_jax.models.qwen_config import QwenConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter. `name` holds `{layer}` where `stacked`; `part` = (index, count) of a fused tensor's rows."""

    path: Path
    name: str
    view: tuple[int, ...]
    perm: tuple[int, ...]
    hf_shape: tuple[int, ...]
    num_layers: int = 0
    part: tuple[int, int] = (0, 1)

    @property
    def names(self) -> list[str]:
        """The checkpoint's tensors, one a layer."""
        return [self.name.format(layer=layer) for layer in range(self.num_layers)] if self.num_layers else [self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape, without the layers axis."""
        return tuple(self.view[axis] for axis in self.perm)


def canonical_name(name: str) -> str:
    """The hub's name of a tensor, from any of the published layouts.

    Layouts: `model.layers.*`, `visual.*`; `model.language_model.*`, `model.visual.*`; `language_model.*`, `visual.*`.
    """
    name = re.sub(r"^model\.(visual|language_model)\.", r"\1.", name)
    name = re.sub(r"^language_model\.(model\.)?", "model.", name)
    return name


def weight_table(config: QwenConfig) -> list[Entry]:
    return _text_entries(config) + _vision_entries(config)


def _matrix(path: str, name: str, rows: int, columns: int, layers: int = 0) -> Entry:
    """A linear layer: rows are outputs there and the last axis here."""
    return Entry(tuple(path.split(".")), name, (rows, columns), (1, 0), (rows, columns), layers)


def _vector(path: str, name: str, size: int, layers: int = 0) -> Entry:
    return Entry(tuple(path.split(".")), name, (size,), (0,), (size,), layers)


def _heads(
    path: str, name: str, sizes: tuple[int, int, int], layers: int, part: tuple[int, int] = (0, 1)
) -> list[Entry]:
    """Kernel and bias of a projection into heads; sizes = (heads, head_dim, inputs)."""
    n, h, d = sizes
    base = tuple(path.split("."))
    return [
        Entry((*base, "kernel"), f"{name}.weight", (n, h, d), (2, 0, 1), (part[1] * n * h, d), layers, part),
        Entry((*base, "bias"), f"{name}.bias", (n, h), (0, 1), (part[1] * n * h,), layers, part),
    ]


def _output(path: str, name: str, sizes: tuple[int, int, int], layers: int) -> Entry:
    n, h, d = sizes
    return Entry(tuple(path.split(".")), f"{name}.weight", (d, n, h), (1, 2, 0), (d, n * h), layers)


def _mlp(path: str, name: str, d: int, f: int, layers: int, bias: bool) -> list[Entry]:
    entries = []
    for part, (rows, columns) in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
        entries.append(_matrix(f"{path}.{part}.kernel", f"{name}.{part}_proj.weight", rows, columns, layers))
        if bias:
            entries.append(_vector(f"{path}.{part}.bias", f"{name}.{part}_proj.bias", rows, layers))
    return entries


def _text_entries(config: QwenConfig) -> list[Entry]:
    d, n, k, h, layers = config.d_model, config.heads, config.kv_heads, config.head_dim, config.layers
    ours, theirs = "text.layers", "model.layers.{layer}"
    entries = [
        Entry(("text", "embedding"), "model.embed_tokens.weight", (config.vocab, d), (0, 1), (config.vocab, d)),
        _vector("text.norm.scale", "model.norm.weight", d),
        _vector(f"{ours}.attention_norm.scale", f"{theirs}.input_layernorm.weight", d, layers),
        _vector(f"{ours}.mlp_norm.scale", f"{theirs}.post_attention_layernorm.weight", d, layers),
        *_heads(f"{ours}.attention.query", f"{theirs}.self_attn.q_proj", (n, h, d), layers),
        *_heads(f"{ours}.attention.key", f"{theirs}.self_attn.k_proj", (k, h, d), layers),
        *_heads(f"{ours}.attention.value", f"{theirs}.self_attn.v_proj", (k, h, d), layers),
        _output(f"{ours}.attention.output", f"{theirs}.self_attn.o_proj", (n, h, d), layers),
        *_mlp(f"{ours}.mlp", f"{theirs}.mlp", d, config.d_ff, layers, bias=False),
    ]
    if not config.tied:
        entries.append(_matrix("text.head.kernel", "lm_head.weight", config.vocab, d))
    return entries


def _vision_entries(config: QwenConfig) -> list[Entry]:
    vision = config.vision
    d, n, h, layers = vision.d_model, vision.heads, vision.head_dim, vision.depth
    ours, theirs = "vision.blocks", "visual.blocks.{layer}"
    wide = d * vision.merge_size**2
    patch = (d, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    entries = [
        Entry(("vision", "patch_embedding"), "visual.patch_embed.proj.weight", (d, vision.patch_dim), (1, 0), patch),
        _vector(f"{ours}.attention_norm.scale", f"{theirs}.norm1.weight", d, layers),
        _vector(f"{ours}.mlp_norm.scale", f"{theirs}.norm2.weight", d, layers),
        _output(f"{ours}.output", f"{theirs}.attn.proj", (n, h, d), layers),
        _vector(f"{ours}.output_bias", f"{theirs}.attn.proj.bias", d, layers),
        *_mlp(f"{ours}.mlp", f"{theirs}.mlp", d, vision.d_ff, layers, bias=True),
        _vector("vision.merger.norm.scale", "visual.merger.ln_q.weight", d),
        _matrix("vision.merger.up.kernel", "visual.merger.mlp.0.weight", wide, wide),
        _vector("vision.merger.up.bias", "visual.merger.mlp.0.bias", wide),
        _matrix("vision.merger.down.kernel", "visual.merger.mlp.2.weight", vision.out_dim, wide),
        _vector("vision.merger.down.bias", "visual.merger.mlp.2.bias", vision.out_dim),
    ]
    for index, part in enumerate(("query", "key", "value")):
        entries += _heads(f"{ours}.{part}", f"{theirs}.attn.qkv", (n, h, d), layers, part=(index, 3))
    return entries
