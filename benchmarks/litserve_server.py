"""LitServe around a `Reranker`: requests that wait form a batch, as in LitServe's own examples; for `bench_serve.py`.

    python benchmarks/litserve_server.py ADAPTER BASE_LM PORT SECONDS [--cached]

A batch is scored in one call. Without ``--cached`` whole prompts are read, sorted by length: a server that batches
requests and shares no documents. With it the reranker shares documents and has a cache, as ours.
"""

from __future__ import annotations

import argparse
from typing import Any

import litserve

import qpeft_ext as qpeft


class RerankApi(litserve.LitAPI):
    """Scores batches of requests.

    Args:
        adapter, base_model: of the reranker.
        cached: whether it shares documents and has a cache.
    """

    def __init__(self, adapter: str, base_model: str, cached: bool, **options: Any) -> None:
        super().__init__(**options)
        self.adapter, self.base_model, self.cached = adapter, base_model, cached

    def setup(self, device: str) -> None:
        options: dict[str, Any] = {"cache": qpeft.DocumentCache(1 << 30)} if self.cached else {"path": "plain"}
        model = qpeft.QPeftModel.from_pretrained(self.adapter, self.base_model, device="cpu", dtype="float32")
        self.reranker = qpeft.Reranker(model, truncate_queries=True, **options)

    def decode_request(self, request, **kwargs: Any) -> tuple[str, list[str]]:  # an annotation would make it a model
        return request["query"], request["documents"]

    def predict(self, inputs: list[tuple[str, list[str]]], **kwargs: Any) -> list[list[float]]:
        pairs = [(query, document) for query, documents in inputs for document in documents]
        scores = iter(self.reranker.predict(pairs, show_progress_bar=False).tolist())
        return [[next(scores) for _ in documents] for _, documents in inputs]

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float], **kwargs: Any) -> dict[str, Any]:
        results = [{"index": i, "relevance_score": score} for i, score in enumerate(output)]
        return {"results": sorted(results, key=lambda result: -result["relevance_score"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("base_model")
    parser.add_argument("port", type=int)
    parser.add_argument("seconds", type=int, help="until a request is given up")
    parser.add_argument("--cached", action="store_true")
    given = parser.parse_args()
    api = RerankApi(given.adapter, given.base_model, given.cached, max_batch_size=32, batch_timeout=0.05,
                    api_path="/v1/rerank")  # fmt: skip
    litserve.LitServer(api, accelerator="cpu", timeout=given.seconds).run(port=given.port, generate_client_file=False)


if __name__ == "__main__":
    main()
