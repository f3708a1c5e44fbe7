"""A LoRA trained on a reranker's own prompt, query first: gradients, a step of the trainer, and files."""

from __future__ import annotations

import pytest
import torch
from families.tiny import tiny_lm
from prompts.reranker_cards import PAIRS
from prompts.reranker_tokenizers import qwen_tokenizer
from training.tiny_training import EXAMPLES, trainer, weights

import qpeft_ext as qpeft

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow
FILE = "Document: {{ document }}\nQuery: {{ query }}\nRelevant:"


def model_of(template: str = "qwen3_reranker", **options) -> qpeft.QPeftModel:
    tokenizer = qwen_tokenizer()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    lm = peft.get_peft_model(tiny_lm("qwen3", vocab_size=len(tokenizer), max_position_embeddings=1024), config)
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(template=template, **options), tokenizer)


def gradients(model, path: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    scores = model(model.encode(PAIRS), path=path).compared
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return scores, list(torch.autograd.grad((scores - 0.5).square().sum(), trained))


@pytest.mark.parametrize("options", [{}, {"suffix_micro_batch": 2}, {"template": FILE}], ids=["one", "micro", "file"])
def test_gradients_through_a_shared_query_are_those_of_whole_prompts(options):
    model = model_of(**options)
    (shared, ours), (plain, expected) = (gradients(model, path) for path in ("document_first", "plain"))
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 1e-3
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("template", ["qwen3_reranker", FILE])
def test_it_trains_and_is_loaded_bit_equal(template, tmp_path):
    model = model_of(template, loss="binary_cross_entropy", queries_per_group=4)
    before = weights(model)
    run = trainer(tmp_path / "run", model)
    run.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(model).items())
    model.eval()
    expected = model.score(PAIRS).compared
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_lm("qwen3", vocab_size=len(qwen_tokenizer()), max_position_embeddings=1024)
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", base, qwen_tokenizer())
    assert loaded.qpeft_config.template == template
    assert torch.equal(loaded.score(PAIRS).compared, expected)


def test_each_document_of_a_step_is_counted_once(tmp_path):
    run = trainer(tmp_path, model_of(loss="listwise"), EXAMPLES[:4], max_steps=1)
    run.train()
    documents = {text["text"] for e in EXAMPLES[:4] for text in (*e["positives"], *e["negatives"][:1])}
    assert run.counts.documents_read == len(documents)
