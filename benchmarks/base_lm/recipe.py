"""The settings of a base LM, and the untrained model that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, apart from the installed packages."""

    seed: int = 0
    # model
    vocabulary: int = 4096
    layers: int = 3
    width: int = 192
    inner_width: int = 512
    heads: int = 6
    key_value_heads: int = 2
    initial_scale: float = 0.06  # of all weights; transformers' 0.02 is meant for wider models
    # lengths in tokens
    max_document_tokens: int = 160
    max_query_tokens: int = 48
    # stage 1: plain repetitions
    copy_batch: int = 32
    copy_ids: int = 4096  # of the most frequent ids only: copying what is rare follows
    copy_learning_rate: float = 2e-3  # at a width of 512 nothing is copied after 2,700 steps; 5e-4 does it
    copy_accuracy: float = 0.95
    copy_most_steps: int = 3000
    # stage 2: queries of documents
    steps: int = 6000
    batch: int = 16  # documents; each carries about four queries
    passages: float = 0.0  # share of documents that are passages (--passages-from), not definitions
    asked: float = 0.3  # share of passages that have a question
    documented: float = 0.7  # share of documents that have a docstring; 0.95 during the decay
    decay: float = 0.3  # share of the steps, at the end, over which the learning rate falls to zero
    warmup: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    document_loss: float = 0.1  # weight of plain language modelling on a few document tokens
    document_loss_tokens: int = 16  # per document

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate begins to fall; a multiple of 8, which keeps groups of batches whole."""
        return math.ceil((1 - self.decay) * self.steps / 8) * 8


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=1024,
        initializer_range=recipe.initial_scale,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)
