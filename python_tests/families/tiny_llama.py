"""A tiny random Llama and a tokenizer built as Llama's: SentencePiece BPE with byte fallback, <s> = 1, </s> = 2."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# whole words; everything else is in letters, and what is no letter below in bytes
_WORDS = ("▁Question ▁Pass age ▁hint ▁the ▁given ▁please ▁moon ▁tide ▁sea ▁boat the ▁is").split()


def tiny_llama_tokenizer() -> PreTrainedTokenizerFast:
    """About 400 pieces; no pad token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *string.ascii_letters, *"0123:,.?_"]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
                pieces.append(word[: end + 1])
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama over these pieces whose attention matters: weights of N(0, 0.25)."""
    config = LlamaConfig(
        vocab_size=len(tiny_llama_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    lm = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return lm.eval()
