"""A tiny model, its trainer and examples, for all tests that train."""

from __future__ import annotations

import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

TOPICS = ["tides", "boats", "harbours", "lamps", "ropes", "sails", "storms", "gulls", "nets", "piers", "fog", "maps"]
EXAMPLES = [
    {
        "query_id": f"q{i}",
        "query": f"about {word}?",
        "positives": [{"id": f"p{i}", "text": f"{word} by the sea, {word}"}],
        "negatives": [{"id": f"n{i}-{j}", "text": f"a note of {TOPICS[(i + j + 1) % 12]}"} for j in range(3)],
    }
    for i, word in enumerate(TOPICS)
]

EACH_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
}


def tiny_model(lm=None, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": "attention", "num_heads": 4, "rank": 8, "k": 5} | options)
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), config, tiny_tokenizer())


def trainer(
    folder, model=None, examples=EXAMPLES, dev=None, callbacks=None, cache_bytes=0, deterministic=False, **args
) -> qpeft.QPeftTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | args
    args = transformers.TrainingArguments(str(folder), **settings)
    return qpeft.QPeftTrainer(
        model or tiny_model(),
        args,
        examples,
        dev,
        callbacks=callbacks,
        cache_bytes=cache_bytes,
        deterministic=deterministic,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Stream:
    """An iterable of examples without a length, that can be read again."""

    def __iter__(self):
        return iter(EXAMPLES)


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)
