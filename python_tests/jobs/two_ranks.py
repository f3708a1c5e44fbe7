"""Train the same tiny models in one process and on two ranks (gloo, CPU) with the same global batch.

Used by test_two_ranks.py.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from accelerate import state
from families.tiny import tiny_lm
from jobs.processes import Forked
from safetensors.torch import save_file
from training.tiny_training import EXAMPLES, Stream, tiny_model, trainer, weights


def with_lora():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return tiny_model(peft.get_peft_model(tiny_lm("llama"), config))


SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 1}
SCENARIOS = {
    # name: (model, examples, other arguments); a global batch of 8 queries, in groups of 4
    "one step": (tiny_model, EXAMPLES[:8], SGD),
    # 8 queries, then 2: one rank has nothing to do in the second step
    "uneven": (tiny_model, EXAMPLES[:10], SGD | {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.05}),
    # one step of 8 + 4 queries; the other rank has nothing in its second half
    "accumulation": (tiny_model, EXAMPLES, SGD | {"gradient_accumulation_steps": 2}),
    "recomputed": (lambda: tiny_model(suffix_micro_batch=3, clues="top_k", loss="listwise"), EXAMPLES[:8], SGD),
    "LoRA": (with_lora, EXAMPLES[:8], SGD),
    "stream": (tiny_model, Stream(), SGD | {"max_steps": 2, "learning_rate": 0.05}),
    "Adam, resumed": (tiny_model, EXAMPLES, {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}),
}


def on_ranks(world: int, work: Callable[[], int | None]) -> list[Forked]:
    """Start the processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]

    def begin() -> int | None:
        for singleton in (state.PartialState, state.AcceleratorState, state.GradientState):
            singleton._shared_state.clear()  # an earlier training has left there that it was the only rank
        return work()

    return [Forked(begin, environment=environment, seconds=300) for environment in ranks]


def train_all(folder: Path) -> None:
    """Write SCENARIO-WORLDSIZE.safetensors and .json for each scenario into ``folder``, on rank 0."""
    transformers.logging.set_verbosity_error()
    for name in SCENARIOS:
        _train(folder, name, int(os.environ["WORLD_SIZE"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _train(folder: Path, name: str, world: int) -> None:
    make, examples, arguments = SCENARIOS[name]
    arguments = {"train_sampling_strategy": "random" if "Adam" in name else "sequential"} | arguments

    def one(resume=None):
        dev = Stream() if name == "stream" else EXAMPLES[:5]  # five: fills no batch of two ranks
        done = trainer(
            folder / f"{name}-{world}",
            make(),
            examples,
            dev=dev,
            per_device_train_batch_size=8 // world,
            per_device_eval_batch_size=2,
            ddp_backend="gloo" if world > 1 else None,
            **arguments,
        )
        loss = done.train(resume).training_loss
        # five of them again, with as many documents as each has
        uneven = [{**example, "negatives": example["negatives"][:i]} for i, example in enumerate(EXAMPLES[:5])]
        predicted = done.predict(uneven)
        assert (predicted.predictions == -float("inf")).tolist() == (predicted.label_ids == -100).tolist()
        scores = {
            f"score {q} {c}": float(predicted.predictions[q, c])
            for q, c in zip(*map(list, (predicted.label_ids != -100).nonzero()), strict=True)
        }
        return done, {"loss": loss, **done.evaluate(), **scores}

    done, results = one()
    if "resumed" in name:
        whole = weights(done.model)
        done, _ = one(str(folder / f"{name}-{world}" / "checkpoint-3"))
        difference = max(float((w - whole[key]).abs().max()) for key, w in weights(done.model).items())
        results["difference to the resumed one"] = difference
    if done.is_world_process_zero():
        save_file(weights(done.model), folder / f"{name}-{world}.safetensors")
        results = {key: value for key, value in results.items() if not key.endswith(("runtime", "per_second"))}
        (folder / f"{name}-{world}.json").write_text(json.dumps(results))
