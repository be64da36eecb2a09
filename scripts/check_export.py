"""Load an exported directory with the installed transformers and torch, and compare logits between versions.

    python scripts/check_export.py DIR --save logits.npz         # in one environment
    python scripts/check_export.py DIR --compare logits.npz      # in another one; exit status 1 if they differ

Checked are the keys (none missing, unexpected or of another shape), the tokenizer and its chat template, the image
preprocessor, the generation config, and that float32 logits of a text and of a prompt with two images are finite.
Nothing of this package is imported: any environment with torch, transformers and pillow will do.
"""

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
import transformers
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

GRIDS = ((1, 10, 14), (1, 4, 6))
TOLERANCE = 1e-4  # of the largest logit; the same sums in another order


def make_inputs(config: transformers.PretrainedConfig) -> dict[str, torch.Tensor]:
    """One row of text around two images, by a fixed seed."""
    vision = config.vision_config
    vocab = config.get_text_config().vocab_size
    special = (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id)
    usable = np.array([token for token in range(min(1000, vocab)) if token not in special])
    rng = np.random.default_rng(0)
    ids = list(rng.choice(usable, 7))
    for _, height, width in GRIDS:
        images = [config.image_token_id] * (height * width // vision.spatial_merge_size**2)
        ids += [config.vision_start_token_id, *images, config.vision_end_token_id, *rng.choice(usable, 5)]
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    num_patches = sum(height * width for _, height, width in GRIDS)
    row = torch.tensor([ids])
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "pixel_values": torch.from_numpy(rng.uniform(-1.5, 1.5, (num_patches, patch)).astype(np.float32)),
        "image_grid_thw": torch.tensor(GRIDS),
        "mm_token_type_ids": (row == config.image_token_id).long(),  # transformers 5; else positions are 1-D
    }


def compute_logits(directory: Path) -> dict[str, np.ndarray]:
    """Float32 logits of the text alone and of all. Raises SystemExit if the keys do not fit."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise SystemExit(f"error: {directory}: keys do not fit: {wrong}")
    print(f"{type(model).__name__}: {sum(parameter.numel() for parameter in model.parameters())} parameters")
    inputs = make_inputs(model.config)
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        del inputs["mm_token_type_ids"]
    text = inputs["input_ids"][:, :7]
    with torch.no_grad():
        found = {
            "text": model(input_ids=text, attention_mask=torch.ones_like(text)).logits,
            "images": model(**inputs).logits,
        }
    return {name: logits.float().numpy() for name, logits in found.items()}


def check_companions(directory: Path) -> None:
    """Raises what transformers raises if one cannot be loaded."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    words = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 3 = ?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(words)["input_ids"]
    print(f"tokenizer: {len(tokenizer)} entries; chat template: {len(ids)} tokens")
    if tokenizer.decode(ids) != words:
        raise SystemExit(f"error: {directory}: the tokenizer does not give back its own chat template")
    generation = GenerationConfig.from_pretrained(directory)
    print(f"generation config: end tokens {generation.eos_token_id}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {options.directory}")
    logits = compute_logits(options.directory)
    check_companions(options.directory)
    if options.save:
        np.savez(options.save, text=logits["text"], images=logits["images"])
    bad = [name for name, found in logits.items() if not np.isfinite(found).all()]
    for name, found in logits.items():
        print(f"{name}: logits {list(found.shape)}, largest {np.abs(found).max():.4f}")
        if options.compare:
            with np.load(options.compare) as other:
                error = float(np.abs(found - other[name]).max() / np.abs(other[name]).max())
            print(f"{name}: largest difference {error:.1e} of the largest logit")
            if not error < TOLERANCE:
                bad.append(name)
    print(f"FAILED: {', '.join(bad)}" if bad else "ok")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
