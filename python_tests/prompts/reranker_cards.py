"""What the model cards of known rerankers do with a pair: a plain restatement of each, and pairs to try them on."""

from __future__ import annotations

from prompts.reranker_tokenizers import gemma_tokenizer, qwen_tokenizer

QUERIES = ["why do the tides rise?", "boats", "the sea (moon)!"]
DOCUMENTS = ["because the moon pulls the sea.", "(boats)\nharbours", {"title": "Moon", "text": "pulls 10 seas"}, ""]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


def text_of(document) -> str:
    return document if isinstance(document, str) else f"{document['title']} {document['text']}"


def card_of_qwen3(tokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    """https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, "Transformers Usage"."""
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    behind = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    pair = f"<Instruct>: {instruction or WEB_SEARCH}\n<Query>: {query}\n<Document>: {document}"
    return [i for text in (before, pair, behind) for i in tokenizer.encode(text, add_special_tokens=False)]


def card_of_mxbai(tokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    """https://github.com/mixedbread-ai/mxbai-rerank, ``MxbaiRerankV2.prepare_inputs``."""
    asked = f"query: {query}" if instruction is None else f"instruction: {instruction}\nquery: {query}"
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    texts = [
        system + "<|im_start|>user\n", asked, "\n", f"document: {document}", "\n", task,
        "<|im_end|>\n<|im_start|>assistant\n",
    ]  # fmt: skip
    return [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]


def card_of_flag(tokenizer, query: str, document: str, instruction: None = None) -> list[int]:
    """https://huggingface.co/BAAI/bge-reranker-v2-gemma, "Using Huggingface transformers"."""
    task = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    texts = [f"A: {query}", "\n", f"B: {document}", "\n", task]
    return [
        *([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]),
        *(i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)),
    ]


CARDS = {
    "qwen3_reranker": (card_of_qwen3, qwen_tokenizer),
    "mxbai_rerank": (card_of_mxbai, qwen_tokenizer),
    "flag_reranker": (card_of_flag, gemma_tokenizer),
}
