"""Count what each variant trains on a Llama-2-7B shape, and write the table of docs/training.md between its markers.

    python benchmarks/trainable_parameters.py          rewrite
    python benchmarks/trainable_parameters.py --check  fail if the page does not show these counts

Everything is on the meta device: shapes without storage.
"""

from __future__ import annotations

import logging
import sys

import markers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qpeft_ext.adapters.attention_clues import AttentionClues
from qpeft_ext.adapters.generated_lora import GeneratedLora
from qpeft_ext.adapters.soft_prompt import SoftPrompt
from qpeft_ext.adapters.top_k_clues import TopKClues
from qpeft_ext.config import QPeftConfig
from qpeft_ext.official.clues import OfficialAttentionClues, OfficialTopKClues
from qpeft_ext.official.prompt import OfficialTokens

V, D = 32000, 4096
LLAMA_2_7B = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=11008, num_hidden_layers=32,
                         num_attention_heads=32)  # fmt: skip

VARIANTS: tuple[dict, ...] = (
    {"clues": "attention"},
    {"clues": "attention", "rank": 64},
    {"clues": "attention", "rank": None},
    {"clues": "top_k"},
    {"clues": "top_k", "rank": 64},
    {"clues": "top_k", "score_gate": True},
    {"clues": "top_k", "clue_embeddings": "low_rank"},
    {"clues": "top_k", "clue_embeddings": "low_rank", "rank": 64},
    {"clues": "top_k", "clue_embeddings": "low_rank", "score_gate": True},
    {"clues": "attention", "generated_lora_rank": 16},
    {"clues": "none", "generated_lora_rank": 16},
    {"clues": "top_k", "generated_lora_rank": 16, "target_modules": ("all-linear",)},
    {"clues": "none", "num_virtual_tokens": 20},
    {"clues": "none", "num_virtual_tokens": 20, "soft_prompt_mlp": 256},
    {"clues": "attention", "num_virtual_tokens": 20},
    {"clues": "top_k", "compat": "official"},
    {"clues": "attention", "compat": "official"},
)


def count(options: dict, lm: torch.nn.Module | None = None) -> tuple[int, int]:
    """Trained parameters of a variant, and the bytes that its adapter file holds (float32)."""
    config, module = QPeftConfig(**options).resolve(D), torch.nn.ModuleList()
    with torch.device("meta"):
        table, allowed = torch.empty(V, D), torch.empty(V, dtype=torch.bool)
        if config.compat == "official":
            kind = OfficialTopKClues if config.clues == "top_k" else OfficialAttentionClues
            module.append(kind(config, table, OfficialTokens((), (), ()), allowed, decode=None))
        elif config.clues == "attention":
            module.append(AttentionClues(config, D))
        elif config.clues == "top_k":
            module.append(TopKClues(config, table, allowed))
        if config.generated_lora_rank:
            module.append(GeneratedLora(lm, D, config.generated_lora_rank, config.target_modules))
        if config.num_virtual_tokens:
            module.append(SoftPrompt(torch.empty(config.num_virtual_tokens, D), 1.0, 1, config.soft_prompt_mlp))
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return trained, sum(tensor.nbytes for tensor in module.state_dict().values())


def table() -> str:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(LLAMA_2_7B, trust_remote_code=False)
    frozen = sum(parameter.numel() for parameter in lm.parameters())
    lines = ["| variant | `rank` | trained | % of all | adapter file |", "|---|---|---|---|---|"]
    for options in VARIANTS:
        trained, size = count(options, lm)
        config = QPeftConfig(**options).resolve(D)
        more = [f"{name}={value!r}" for name, value in options.items() if name not in ("clues", "rank")]
        words = ", ".join([f"`{config.clues}`", *(f"`{option}`" for option in more)])
        share = 100 * trained / (frozen + trained)
        share, megabytes = (
            f"{x:,.{digits if x >= least else digits + 1}f}"
            for x, digits, least in ((share, 2, 0.005), (size / 1e6, 0, 1))
        )  # never a bare zero
        default = " (default)" if "rank" not in options and not more else ""
        rank = "–" if config.clues == "none" else config.rank
        lines.append(f"| {words}{default} | {rank} | {trained:,} | {share} | {megabytes} MB |")
    return "\n".join(lines) + "\n"


def main() -> int:
    logging.getLogger("qpeft_ext").setLevel(logging.ERROR)  # that "full" is large is what the table says
    check = "--check" in sys.argv
    outdated = markers.write_tables("parameters", lambda name, page: table(), check)
    return markers.report(outdated, check, "benchmarks/trainable_parameters.py")


if __name__ == "__main__":
    raise SystemExit(main())
