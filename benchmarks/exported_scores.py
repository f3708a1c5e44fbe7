"""The baselines OpenVINO and ONNX Runtime: likelihoods of queries from an exported LM, in a Python of their own.

    pip install 'optimum-intel[openvino,nncf]' 'optimum-onnx[onnxruntime]'     # their transformers is older than ours
    python benchmarks/exported_scores.py openvino FOLDER 2 < requests          # as runtime_systems.py calls it

An exported graph reads whole prompts, sorted by length, and gives its last hidden states; the LM's head runs on the
rows before query tokens only, in float32. Both are what a good user does: the graph of a causal LM would write logits
for every position. Prefixes are not shared: an exported graph keeps its keys inside, so there is no warm work.

A request is a line of JSON: ``{"rows": [{"ids", "slots", "targets"}, …]}``. The answer is one: ``{"scores": […]}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

KINDS = ("openvino", "openvino_int8", "onnx", "onnx_int8")
TOKENS = 2048  # of a batch, padding included; between 1,024 and 4,096 nothing differs by more than the noise

Graph = Callable[[np.ndarray, np.ndarray], np.ndarray]


def openvino_graph(folder: Path, threads: int, int8: bool) -> Graph:
    """Export the LM of a folder to OpenVINO, once. Returns: ids and mask [B, L] -> hidden states [B, L, H]."""
    import openvino
    from optimum.intel import OVModelForFeatureExtraction, OVWeightQuantizationConfig

    made = folder / ("openvino_int8" if int8 else "openvino")
    if not made.is_dir():
        weights = OVWeightQuantizationConfig(bits=8) if int8 else None
        lm = OVModelForFeatureExtraction.from_pretrained(
            folder,
            export=True,
            compile=False,
            load_in_8bit=False,
            quantization_config=weights,
            trust_remote_code=False,
        )
        lm.save_pretrained(made)
    # Weights in 8 bits: activations are rounded in groups while the graph runs, which lets it multiply in 8 bits.
    how = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(str(made / "openvino_model.xml"), "CPU", how)
    names, request = [port.get_any_name() for port in compiled.inputs], compiled.create_infer_request()
    return lambda ids, mask: request.infer(_inputs(names, ids, mask))[0]


def onnx_graph(folder: Path, threads: int, int8: bool) -> Graph:
    """Export the LM of a folder to ONNX, once. Returns: as `openvino_graph`."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    made, small = folder / "onnx" / "model.onnx", folder / "onnx" / "int8.onnx"
    if not made.is_file():
        exported = ORTModelForFeatureExtraction.from_pretrained(folder, export=True, trust_remote_code=False)
        exported.save_pretrained(made.parent)
    if int8 and not small.is_file():
        quantize_dynamic(made, small, per_channel=True, weight_type=QuantType.QInt8)
    how = onnxruntime.SessionOptions()
    how.intra_op_num_threads, how.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(small if int8 else made), how, ["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda ids, mask: session.run(None, _inputs(names, ids, mask))[0]


def _inputs(names: list[str], ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    return {name: given[name] for name in names}


def score(graph: Graph, table: torch.Tensor, rows: list[dict]) -> list[float]:
    """Return the log-likelihood of each row's targets; ``table``: the LM's head, float32 [V, H]."""
    scores, order = [0.0] * len(rows), sorted(range(len(rows)), key=lambda i: -len(rows[i]["ids"]))
    start = 0
    while start < len(order):
        longest = len(rows[order[start]]["ids"])
        batch = order[start : start + max(1, TOKENS // longest)]
        start += len(batch)
        ids, mask = (np.zeros((len(batch), longest), dtype=np.int64) for _ in range(2))
        for place, i in enumerate(batch):
            ids[place, : len(rows[i]["ids"])] = rows[i]["ids"]
            mask[place, : len(rows[i]["ids"])] = 1
        hidden = torch.from_numpy(graph(ids, mask))
        read = [hidden[place, rows[i]["slots"]] for place, i in enumerate(batch)]
        targets = torch.tensor([t for i in batch for t in rows[i]["targets"]])
        logits = torch.cat(read) @ table.T
        each = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
        for i, part in zip(batch, each.split([len(rows[i]["slots"]) for i in batch]), strict=True):
            scores[i] = float(part.double().sum())
    return scores


def main() -> None:
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = weights.keys()
        name = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
        table = weights.get_tensor(name).float()
    make = openvino_graph if kind.startswith("openvino") else onnx_graph
    answers, sys.stdout = sys.stdout, sys.stderr  # what exporters print is no answer
    graph = make(folder, threads, kind.endswith("int8"))
    print("{}", file=answers, flush=True)  # ready
    with torch.inference_mode():
        for line in sys.stdin:
            rows = json.loads(line)["rows"]
            print(json.dumps({"scores": score(graph, table, rows)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
