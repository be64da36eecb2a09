"""The transformers side of bench_sampling.py, in a process of its own. Needs torch (the parity extra).

    python scripts/bench_sampling_hf.py MODEL_DIRECTORY JOB

    repeat                `generate` on every prompt as often as it has samples: what trainers do
    num_return_sequences  `generate` with that argument: an image is encoded once, a prompt prefilled for each sample
    prefix                written here: every prompt prefilled once, its cache repeated, then one forward pass a token

Prints one JSON line, and writes the most probable tokens of every mode to greedy.npz.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
import transformers
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.utils.logging import set_verbosity_error


@dataclasses.dataclass(frozen=True)
class Side:
    """A loaded model and its prompts; every mode is (new_tokens, temperature) → tokens [prompts * samples, new]."""

    model: Any
    token_ids: torch.Tensor  # [prompts, seq], of one length
    patches: torch.Tensor  # [prompts, patches, patch_dim]
    grids: torch.Tensor  # [prompts, 3]
    suppressed: torch.Tensor
    image_token: int
    samples: int

    def inputs(self, copies: int) -> dict[str, torch.Tensor]:
        """Arguments of `forward`, every prompt `copies` times in a row, with its image."""
        ids = self.token_ids.repeat_interleave(copies, dim=0)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": self.patches.repeat_interleave(copies, dim=0).flatten(0, 1),
            "image_grid_thw": self.grids.repeat_interleave(copies, dim=0),
            "mm_token_type_ids": (ids == self.image_token).long(),
        }

    def repeat(self, new_tokens: int, temperature: float) -> torch.Tensor:
        return self._generate(self.inputs(self.samples), new_tokens, temperature, 1)

    def num_return_sequences(self, new_tokens: int, temperature: float) -> torch.Tensor:
        return self._generate(self.inputs(1), new_tokens, temperature, self.samples)

    def _generate(
        self, inputs: Mapping[str, torch.Tensor], new_tokens: int, temperature: float, returned: int
    ) -> torch.Tensor:
        if temperature == 0 and returned > 1:
            raise ValueError("generate returns one sequence a prompt where it is greedy")
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self.model.model.rope_deltas = None  # kept from call to call
        found = self.model.generate(
            **inputs,
            **(choice if temperature else {"do_sample": False}),
            num_return_sequences=returned,
            max_new_tokens=new_tokens,
            suppress_tokens=self.suppressed.tolist(),
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[:, inputs["input_ids"].shape[1] :]

    def prefix(self, new_tokens: int, temperature: float) -> torch.Tensor:
        model, prompt_length = self.model, self.token_ids.shape[1]
        model.model.rope_deltas = None
        cache = DynamicCache(config=model.config.get_text_config())
        first = model(**self.inputs(1), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(self.samples)
        place = (prompt_length + model.model.rope_deltas).repeat_interleave(self.samples, dim=0)  # [rows, 1]
        bias = torch.zeros(first.logits.shape[-1])
        bias[self.suppressed] = -torch.inf
        logits = first.logits[:, -1].repeat_interleave(self.samples, dim=0)
        tokens = []
        for step in range(new_tokens):
            tokens.append(_choose(logits + bias, temperature))
            if step + 1 < new_tokens:
                # The decoder itself: what is around it only prepares arguments that are known here.
                out = model.model.language_model(
                    input_ids=tokens[-1],
                    position_ids=(place + step)[None].expand(3, -1, -1),
                    past_key_values=cache,
                    use_cache=True,
                )
                logits = model.lm_head(out.last_hidden_state[:, -1])
        return torch.cat(tokens, dim=1)


def _choose(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)


def load(directory: Path, job: Mapping[str, Any]) -> Side:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with np.load(directory / "prompts.npz") as arrays:
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Side(
        model, found["token_ids"].long(), found["patches"], found["grids"].long(), found["suppressed"].long(),
        job["image_token"], job["samples"],
    )  # fmt: skip


class Calls:
    """Counts images that the vision tower encoded and prompts that the decoder prefilled."""

    def __init__(self, side: Side):
        self.images = self.prompts = 0
        visual, decoder = side.model.model.visual, side.model.model.language_model
        self._hooks = [
            visual.register_forward_pre_hook(self._see_images, with_kwargs=True),
            decoder.register_forward_pre_hook(self._see_prompts, with_kwargs=True),
        ]

    def _see_images(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        grids = named["grid_thw"] if "grid_thw" in named else arguments[1]
        self.images += len(grids)

    def _see_prompts(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        embeddings = named.get("inputs_embeds")
        if embeddings is not None and embeddings.shape[1] > 1:
            self.prompts += len(embeddings)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def timed(call: Callable[[], object]) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return {"cpu_s": round(time.process_time() - cpu, 4), "wall_s": round(time.perf_counter() - wall, 4)}


def measure(side: Side, mode: Callable[..., torch.Tensor], job: Mapping[str, Any]) -> dict[str, Any]:
    """All runs of a mode, and of the same with one new token; the first call of each warms up and is not counted."""
    calls = Calls(side)
    tokens = mode(2, job["temperature"])  # the second token is the first decode step
    assert tokens.shape == (len(side.token_ids) * side.samples, 2)
    calls.close()
    runs = [timed(lambda: mode(job["new_tokens"], job["temperature"])) for _ in range(job["repeats"])]
    mode(1, job["temperature"])
    prefill = [timed(lambda: mode(1, job["temperature"])) for _ in range(job["repeats"])]
    return {"runs": runs, "prefill": prefill, "images": calls.images, "prompts": calls.prompts}


def main(directory: Path, job: Mapping[str, Any]) -> None:
    set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = load(directory, job)
    modes = {"repeat": side.repeat, "num_return_sequences": side.num_return_sequences, "prefix": side.prefix}
    if job["temperature"] == 0:
        del modes["num_return_sequences"]  # refused by generate
    with torch.inference_mode():
        greedy = {name: modes[name](job["check_tokens"], 0.0).numpy() for name in ("repeat", "prefix")}
        np.savez(directory / "greedy.npz", allow_pickle=False, **greedy)
        found = {name: measure(side, mode, job) for name, mode in modes.items()}
    print(
        json.dumps(
            {
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "modes": found,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
