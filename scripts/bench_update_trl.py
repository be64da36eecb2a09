"""The TRL side of bench_update.py, in a process of its own: GRPOTrainer on the same model, prompts and lengths.

    python scripts/bench_update_trl.py MODEL_DIRECTORY JOB

What it needs, and how that is installed, stands in bench_update.py. Phases, in CPU seconds of all threads:

    data       rows of the dataset, their pictures decoded, and what the trainer does between two steps
    processor  Qwen2_5_VLProcessor: GRPOTrainer has every copy of every prompt processed twice a step
    generate   transformers' `generate`
    forward    log-probs, entropies and the loss
    backward
    optimizer  the gradient's norm and AdamW
    other      rewards, advantages, padding, shuffling

Prints one JSON line: versions, all steps, the first one too, and for the last one what the towers were given.
"""

import functools
import importlib.metadata
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
from PIL import Image

PHASES = ("data", "processor", "generate", "forward", "backward", "optimizer")
PIXEL_ERROR = 1e-4  # of normalised pixels; other orders of the same arithmetic differ by 1e-6


def declare_torchvision_operators() -> None:
    """Lets a torchvision built for CUDA, the only kind that is published, be imported beside a CPU build of torch.

    It describes two operators that its own library failed to register. Neither is called here.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[Any] = []  # a library's operators are gone with it


class Meter:
    """CPU seconds by phase and what the towers were given, of the step that is being made; `steps` has those made."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.begin()

    def begin(self) -> None:
        self.counts.clear()
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.started = time.process_time(), time.perf_counter()
        self.mark = self.started[0]

    def since_mark(self, phase: str) -> None:
        now = time.process_time()
        self.phases[phase] += now - self.mark
        self.mark = now

    def end(self) -> None:
        cpu, wall = time.process_time() - self.started[0], time.perf_counter() - self.started[1]
        phases = self.phases | {"other": cpu - sum(self.phases.values())}
        rounded = {name: round(seconds, 4) for name, seconds in phases.items()}
        self.steps.append({"cpu_s": round(cpu, 4), "wall_s": round(wall, 4), "phases": rounded, **self.counts})
        self.begin()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Has every call of `owner.name` counted to a phase, which begins the time that `since_mark` takes anew."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            self.mark = time.process_time()
            result = call(*arguments, **named)
            self.since_mark(phase)
            return result

        setattr(owner, name, timed)

    def count_inputs(self, model: Any) -> None:
        """Counts images that the vision tower encodes, and the token places and passes of the decoder."""

        def see_images(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.counts["images"] += len(named["grid_thw"] if "grid_thw" in named else arguments[1])

        def see_tokens(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            rows, length = named["inputs_embeds"].shape[:2]
            self.counts["tokens"] += rows * length
            self.counts["decoder_passes"] += 1

        model.model.visual.register_forward_pre_hook(see_images, with_kwargs=True)
        model.model.language_model.register_forward_pre_hook(see_tokens, with_kwargs=True)


def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The reward of bench_update.py: the share of odd ids."""
    return [float(np.mean(np.asarray(ids) % 2)) for ids in completion_ids]


def read_rows(directory: Path, job: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for number, question in enumerate(job["questions"]):
        with Image.open(directory / f"image_{number}.png") as image:
            rows.append({"prompt": [{"role": "user", "content": question}], "image": image.convert("RGB")})
    return rows


def check_inputs(directory: Path, job: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Are the prompts those of the other side: token for token, and pixel for pixel up to rounding?"""
    with np.load(directory / "prompts.npz") as arrays:
        token_ids, patches = arrays["token_ids"], arrays["patches"]
    came = named["input_ids"].numpy()
    pixels = named["pixel_values"].numpy().reshape(len(came), *patches.shape[1:])
    places = {ids.tobytes(): place for place, ids in enumerate(token_ids.astype(np.int64))}
    found = Counter(places[ids.tobytes()] for ids in came)
    assert found == dict.fromkeys(places.values(), job["samples"]), found
    for ids, own in zip(came, pixels, strict=True):
        error = np.abs(own - patches[places[ids.tobytes()]]).max()
        assert error < PIXEL_ERROR, error


def make_trainer(directory: Path, job: Mapping[str, Any], meter: Meter) -> Any:
    # Here, not above: all of these import torchvision.
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from trl import GRPOConfig, GRPOTrainer  # ty: ignore[import-not-found]

    rows, num_steps = job["prompts"] * job["samples"], 1 + job["repeats"]
    micro = job["micro_batch"] or rows
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    meter.count_inputs(model)
    meter.wrap(Qwen2_5_VLProcessor, "__call__", "processor")
    settings = GRPOConfig(
        output_dir=str(directory / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro, max_steps=num_steps,
        num_generations=job["samples"], max_completion_length=job["new_tokens"],
        temperature=1.0, top_p=1.0, top_k=0, generation_kwargs={"suppress_tokens": job["suppressed"]},
        learning_rate=job["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        beta=0.0, loss_type="dapo", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        shuffle_dataset=False,  # every step has every prompt
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=settings,
        train_dataset=Dataset.from_list(read_rows(directory, job) * num_steps),  # an epoch is all steps
        processing_class=Qwen2_5_VLProcessor.from_pretrained(directory),
    )
    meter.wrap(trainer, "compute_loss", "forward")
    meter.wrap(trainer.accelerator, "backward", "backward")
    meter.wrap(model, "generate", "generate")
    return trainer


def watch(trainer: Any, meter: Meter, directory: Path, job: Mapping[str, Any]) -> None:
    """Has the meter see the borders of steps, and the first prompts checked before they are timed."""
    from transformers import PrinterCallback, TrainerCallback

    class Borders(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            meter.begin()

        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            meter.since_mark("data")

        def on_optimizer_step(self, *arguments: Any, **named: Any) -> None:
            meter.since_mark("optimizer")

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            meter.end()

    generate = trainer.model.generate

    def checked(*arguments: Any, **named: Any) -> Any:
        if not meter.steps:
            check_inputs(directory, job, named)
        return generate(*arguments, **named)

    trainer.model.generate = checked
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Borders())


def main(directory: Path, job: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        declare_torchvision_operators()
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    meter = Meter()
    trainer = make_trainer(directory, job, meter)
    watch(trainer, meter, directory, job)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(meter.steps) == len(logs) == 1 + job["repeats"]
    lengths = {entry[f"completions/{name}_length"] for entry in logs for name in ("min", "max")}
    assert lengths == {job["new_tokens"]}, lengths
    names = ("torch", "torchvision", "transformers", "trl", "accelerate", "datasets")
    logged = {name: logs[-1].get(name) for name in ("reward", "reward_std", "entropy", "grad_norm")}
    found = {"versions": {name: importlib.metadata.version(name) for name in names}, "steps": meter.steps}
    print(json.dumps(found | {"logged": logged}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
