"""The table of trained parameters in docs/training.md is what the modules have, and the defaults stay small."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

ROOT = Path(__file__).parents[2]


sys.path.insert(0, str(ROOT / "benchmarks"))

markers = pytest.importorskip("markers")


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "trainable_parameters.py"))


def test_the_page_shows_the_counts(script):
    assert markers.names("parameters") == ["llama-2-7b"]
    assert markers.write_tables("parameters", lambda name, page: script["table"](), check=True) == []


def test_the_defaults_train_at_most_one_percent(script):
    rows = [line for line in script["table"]().splitlines() if "(default)" in line or "generated_lora_rank" in line]
    assert len(rows) == 5 and all(float(row.split("|")[4]) <= 1 for row in rows)


def test_counts_worked_out_by_hand(script):
    D, V, r = 4096, 32000, 256
    mlp = 2 * D * r + r + D
    assert script["count"]({"clues": "attention"}) == (4 * (2 * D * r + D) + mlp, 4 * (4 * (2 * D * r + D) + mlp))
    assert script["count"]({"clues": "top_k"})[0] == mlp
    official = V * D + 2 * D * D + 2 * D
    assert script["count"]({"clues": "top_k", "compat": "official"})[0] == official == 164_634_624
    attention = 4 * D * D + 4 * D
    assert script["count"]({"clues": "attention", "compat": "official"})[0] == official + attention == 231_759_872
    assert script["count"]({"clues": "top_k", "clue_embeddings": "full", "rank": None})[0] == official
    assert script["count"]({"clues": "top_k", "score_gate": True})[0] == mlp + 2 * D * r + 2
    soft = {"clues": "none", "num_virtual_tokens": 20}
    assert script["count"](soft) == (20 * D, 4 * 20 * D)
    assert script["count"](soft | {"soft_prompt_mlp": r})[0] == 20 * D + mlp


def test_the_generated_lora_of_default_rank_is_in_the_table(script):
    D, r = 4096, inspect.signature(qpeft.GeneratedLora).parameters["rank"].default
    generator = 64 * D + 64 + 64 * 64 * r + 64 * r  # 64 between the query and the gates of 2 targets in 32 layers
    layer = 4 * 2 * D + 3 * (D + 11008)  # inputs and outputs of all linear layers
    everywhere = {"clues": "top_k", "generated_lora_rank": r, "target_modules": ("all-linear",)}
    trained = 32 * layer * r + 64 * D + 64 + 65 * (7 * 32) * r + script["count"]({"clues": "top_k"})[0]
    assert f"`generated_lora_rank={r}`, `target_modules=('all-linear',)` | 256 | {trained:,} |" in script["table"]()
    assert script["VARIANTS"].count(everywhere) == 1
    assert f"| `none`, `generated_lora_rank={r}` | – | {64 * 2 * D * r + generator:,} | 0.13 |" in script["table"]()


@pytest.mark.parametrize(
    "options",
    [
        {"clues": "attention"},
        {"clues": "top_k", "score_gate": True},
        {"clues": "none", "num_virtual_tokens": 20, "soft_prompt_mlp": 4},
    ],
)
def test_a_saved_adapter_has_the_size_of_its_parameters(options, tmp_path):
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(**options), tiny_tokenizer())
    model.save_pretrained(tmp_path)
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - 4 * model.get_nb_trainable_parameters()[0]
    assert 0 < header < 3000
    card = (tmp_path / "README.md").read_text()
    assert re.search(rf"Trainable parameters: {model.get_nb_trainable_parameters()[0]:,} of", card)
