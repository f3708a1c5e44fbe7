"""Train the demo's base LM: first copying, then queries of documents. See README.md beside this file.

python benchmarks/base_lm/train.py --folder build/base_lm           # resumes from the last complete checkpoint
python benchmarks/base_lm/train.py --folder build/base_lm --package qpeft_ext/demo/base_lm
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from batches import copy_batch, query_batches
from data import TokenisedTexts, prepare
from evaluate import DevSet
from likelihood import hidden_states, log_likelihoods
from recipe import Recipe, new_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qpeft_ext.demo import harvest

# -- losses ------------------------------------------------------------------------------------------------------------


def copy_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    half = ids.shape[1] // 2
    hidden = model.model(ids, use_cache=False)[0]
    logits = model.lm_head(hidden[:, half:-1]).float()  # the first id of the repetition cannot be known
    target = ids[:, half + 1 :]
    accuracy = (logits.argmax(-1) == target).float().mean().item()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()), accuracy


def query_loss(model: LlamaForCausalLM, rows: list, recipe: Recipe, step: int) -> tuple[torch.Tensor, float]:
    """Loss to minimise, and the mean negative log-likelihood of the query tokens in it."""
    hidden, ids, is_query = hidden_states(model, rows)
    query = -log_likelihoods(model, hidden, ids, is_query).mean()
    rng = np.random.default_rng([recipe.seed, 3, step])
    some = torch.zeros_like(is_query)
    for number, row in enumerate(rows):
        prefix = int((row[1] == 0).sum())
        some[number, torch.from_numpy(rng.integers(1, prefix, recipe.document_loss_tokens))] = True
    return query - recipe.document_loss * log_likelihoods(model, hidden, ids, some).mean(), query.item()


# -- training ----------------------------------------------------------------------------------------------------------


class Run:
    """Model, optimiser and log, saved as one folder per checkpoint that appears only when it is complete."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.model = new_model(recipe)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
        self.stage, self.step, self.seconds, self.log = "copy", 0, 0.0, []

    def update(self, loss: torch.Tensor, learning_rate: float) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def save(self) -> None:
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in self.model.named_parameters()}
        for number, parameter in enumerate(self.parameters()):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{number}.{key}"] = value
        name = f"checkpoint-{self.stage}-{self.step:06d}"
        unfinished = self.folder / f"unfinished-{name}"
        unfinished.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished / "state.safetensors")
        state = {"stage": self.stage, "step": self.step, "seconds": self.seconds, "log": self.log}
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        (self.folder / "log.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(self.folder / name, ignore_errors=True)
        unfinished.rename(self.folder / name)
        for old in self.checkpoints()[:-2]:
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))  # "copy" sorts before "query"

    def resume(self) -> bool:
        if not self.checkpoints():
            return False
        last = self.checkpoints()[-1]
        state = json.loads((last / "state.json").read_text())
        self.stage, self.step, self.seconds, self.log = (state[key] for key in ("stage", "step", "seconds", "log"))
        tensors = load_file(last / "state.safetensors")
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
        for number, parameter in enumerate(self.parameters()):
            start = f"optimizer.{number}."
            self.optimizer.state[parameter] = {
                key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)
            }
        print(f"Resumed from {last.name}", flush=True)
        return True


def train(recipe: Recipe, folder: Path, save_every: int, evaluate_every: int, passages: Path | None) -> Run:
    texts = prepare(folder, recipe.vocabulary, recipe.max_document_tokens, recipe.max_query_tokens, recipe.seed,
                    passages)  # fmt: skip
    dev = DevSet(texts.prompt, recipe.seed)
    run = Run(recipe, folder)
    run.resume()
    autocast = torch.autocast("cpu", torch.bfloat16)
    last = time.time()

    def log(**values) -> None:
        nonlocal last
        run.seconds += time.time() - last
        last = time.time()
        row = {"stage": run.stage, "step": run.step, "minutes": round(run.seconds / 60, 2)} | values
        run.log.append(row)
        print(json.dumps(row), flush=True)

    accuracies: list[float] = []
    while run.stage == "copy":
        with autocast:
            loss, accuracy = copy_loss(run.model, copy_batch(recipe, run.step))
        run.update(loss, recipe.copy_learning_rate * min(1.0, (run.step + 1) / recipe.warmup))
        accuracies = [*accuracies[-19:], accuracy]
        learned = len(accuracies) == 20 and np.mean(accuracies) > recipe.copy_accuracy
        if run.step % 100 == 0 or learned:
            log(loss=round(loss.item(), 3), copy_accuracy=round(float(np.mean(accuracies)), 3))
        if learned or run.step >= recipe.copy_most_steps:
            run.stage, run.step = "query", 0
            run.save()

    losses: list[float] = []
    while run.step < recipe.steps:
        decay_start = recipe.decay_start
        group, within = divmod(run.step, 8)
        if within == 0 or not losses:
            batches = query_batches(recipe, texts, group, run.step >= decay_start)
        share = min(1.0, (run.step + 1) / recipe.warmup, (recipe.steps - run.step) / max(1, recipe.steps - decay_start))
        with autocast:
            loss, query_nll = query_loss(run.model, batches[within], recipe, run.step)
        run.update(loss, recipe.learning_rate * share)
        losses.append(query_nll)
        if run.step % 100 == 0:
            log(loss=round(float(np.mean(losses[-100:])), 3))
        if run.step % evaluate_every == 0 or run.step == recipe.steps:
            log(**dev.evaluate(run.model))
        if run.step % save_every == 0 or run.step == recipe.steps:
            run.save()
    return run


def tokens_seen(recipe: Recipe, texts: TokenisedTexts, copy_steps: int, query_steps: int) -> dict[str, int]:
    """Tokens that the LM has read, by stage; padding is none."""
    groups = [query_batches(recipe, texts, group, group * 8 >= recipe.decay_start)
              for group in range(math.ceil(query_steps / 8))]  # fmt: skip
    batches = [batch for group in groups for batch in group][:query_steps]
    return {
        "copy": sum(copy_batch(recipe, step).numel() for step in range(copy_steps)),
        "query": sum(len(row[0]) for batch in batches for row in batch),
    }


def package(run: Run, target: Path, dev_queries: int) -> None:
    """Write the LM in bfloat16 with its tokenizer, and recipe.json with the numbers of the packaged weights."""
    recipe = run.recipe
    texts = prepare(run.folder, recipe.vocabulary, recipe.max_document_tokens, recipe.max_query_tokens, recipe.seed)
    model = run.model.to(torch.bfloat16)
    model.save_pretrained(target)
    texts.tokenizer.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    (target / "model.safetensors").chmod(0o644)
    numbers = DevSet(texts.prompt, recipe.seed, dev_queries).evaluate(model.float())  # bfloat16 values, float32 sums
    packages = harvest.package_versions(harvest.TRAIN_PACKAGES)
    steps_done = run.step if run.stage == "query" else 0
    copy_steps = max((row["step"] for row in run.log if row["stage"] == "copy"), default=0)
    written = {
        "what": f"Base LM of qpeft_ext's {'experiments' if recipe.passages else 'demo'}: ranks by the likelihood of a "
                f"query given {'a passage or ' * (recipe.passages > 0)}Python source. No chat model.",
        "trained_by": "benchmarks/base_lm/train.py",
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "copy_steps_done": copy_steps,
        "query_steps_done": steps_done,
        "tokens_seen": tokens_seen(recipe, texts, copy_steps, steps_done),
        "minutes": round(run.seconds / 60, 1),
        "dev": {"packages": harvest.DEV_PACKAGES, **numbers},
        "log": [row for row in run.log if row["step"] % 500 == 0 or "upr" in row],
        "trained_on": packages,
        "definitions": texts.first_passage,
        "passages": len(texts.documents) - texts.first_passage,
        "docstring_sentences": len(texts.sentences),
        "not_trained_on": harvest.DEV_PACKAGES + harvest.TEST_PACKAGES,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "licence": "Not for distribution: learned from passages of collections for research (MS MARCO and others)."
                   if recipe.passages else
                   "The weights are released with qpeft_ext under Apache-2.0. They were learned from source and "
                   "docstrings of the packages in trained_on, which keep their own open-source licences (PSF, BSD, "
                   "MIT, Apache-2.0 and the like); no text of them is in this folder, only word pieces.",
    }  # fmt: skip
    (target / "recipe.json").write_text(json.dumps(written, indent=1) + "\n")
    print(json.dumps(numbers), sum(path.stat().st_size for path in target.iterdir()), "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints, the log and tokenised text")
    parser.add_argument("--package", type=Path, help="only write the last checkpoint to this folder")
    parser.add_argument("--dev-queries", type=int, default=300, help="that --package ranks for recipe.json")
    parser.add_argument("--passages-from", type=Path, help="folder with collections; see passages.py. With --passages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--evaluate-every", type=int, default=500)
    for option in dataclasses.fields(Recipe):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(**{option.name: getattr(options, option.name) for option in dataclasses.fields(Recipe)})
    if (recipe.passages > 0) != (options.passages_from is not None) and options.package is None:
        parser.error("--passages SHARE and --passages-from FOLDER go together")
    if options.package is None:
        train(recipe, options.folder, options.save_every, options.evaluate_every, options.passages_from)
        return
    run = Run(recipe, options.folder)
    if not run.resume():
        parser.error(f"{options.folder} has no complete checkpoint; train first")
    package(run, options.package, options.dev_queries)


if __name__ == "__main__":
    main()
