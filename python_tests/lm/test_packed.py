"""LMs whose weights stay packed in 8 or 4 bits, by torchao, by bitsandbytes and in fp8 files."""

import importlib.util
import inspect
import json
import shutil
import statistics
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import BASE_LM
from qpeft_ext.lm.packed import count, is_packed, plain_parts
from qpeft_ext.lm.state import LMState, fingerprint_of

pytestmark = pytest.mark.slow


ADAPTER = BASE_LM.parent / "adapter"
KINDS = ("torchao int8", "torchao int8 activations too", "torchao int4", "bitsandbytes int8", "bitsandbytes nf4", "fp8")
NEEDS = {"fp8": "accelerate", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}


def config_of(kind):
    """The quantization_config of a kind; None for fp8, of which there are files only."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if kind == "fp8":
        return None
    from torchao import quantization

    return TorchAoConfig({
        "torchao int8": lambda: quantization.Int8WeightOnlyConfig(),
        "torchao int8 activations too": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "torchao int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[kind]())  # fmt: skip


def write_fp8(folder):
    """Write the packaged LM with the weights of its layers in fp8, each with one scale for 128 x 128 numbers."""
    shutil.copytree(BASE_LM, folder)
    state = load_file(folder / "model.safetensors")
    for name, weight in list(state.items()):
        if ".layers." in name and weight.dim() == 2:
            rows, columns = (-(-size // 128) for size in weight.shape)
            padded = torch.zeros(rows * 128, columns * 128)
            padded[: weight.shape[0], : weight.shape[1]] = weight.float()
            scales = padded.view(rows, 128, columns, 128).abs().amax((1, 3)) / 448
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
            state[name] = (weight.float() / spread).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scales
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory):
    """Each kind of packed LM: its name, and a folder that says it."""
    kind = request.param
    package = NEEDS[kind.split()[0]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"LMs that stay packed by {kind} need the package {package}")
    folder = tmp_path_factory.mktemp("packed") / "lm"
    if kind == "fp8":
        return kind, write_fp8(folder)
    lm = qpeft.load_lm(BASE_LM, dtype="bfloat16", device="cpu", quantization_config=config_of(kind))
    assert any(map(is_packed, lm.parameters()))
    lm.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE_LM / name, folder)
    return kind, folder


@pytest.fixture(scope="module")
def pairs():
    """Ten functions' summaries, each with the text of twenty functions: queries and documents, 200 pairs."""
    functions = [
        f for module in (statistics, shutil, textwrap) for _, f in inspect.getmembers(module, inspect.isfunction)
    ]
    functions = [f for f in functions if f.__doc__ and len(f.__doc__.strip()) > 40][:20]
    queries = [f.__doc__.strip().splitlines()[0] for f in functions[::2]]
    documents = [f"def {f.__name__}{inspect.signature(f)}: " + " ".join(f.__doc__.split())[40:440] for f in functions]
    return queries, documents


@pytest.fixture(scope="module")
def in_bfloat16(pairs):
    """The scores of the pairs by the LM itself."""
    return scores_of(qpeft.QPeftModel.from_pretrained(ADAPTER, BASE_LM, dtype="bfloat16"), pairs)


def scores_of(model, pairs) -> torch.Tensor:
    """[queries, documents]."""
    queries, documents = pairs
    scores = model.score([(query, document) for query in queries for document in documents])
    return scores.query_log_likelihood.view(len(queries), len(documents))


def kendall(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kendall's τ of two lists: the share of pairs in the same order minus that of the others."""
    i, j = torch.triu_indices(len(a), len(a), 1)
    return float(((a[i] - a[j]).sign() * (b[i] - b[j]).sign()).mean())


def test_ranks_agree_with_those_in_bfloat16(packed, pairs, in_bfloat16):
    kind, folder = packed
    model = qpeft.QPeftModel.from_pretrained(ADAPTER, folder)
    assert in_bfloat16.numel() == 200 and not model.engine.why_not_cached and not model.engine.why_unpadded
    scores = scores_of(model, pairs)
    taus = [kendall(a, b) for a, b in zip(scores, in_bfloat16, strict=True)]
    print(f"{kind}: Kendall's τ with bfloat16 {sum(taus) / len(taus):.3f}, each query for itself; of all pairs "
          f"{kendall(scores.flatten(), in_bfloat16.flatten()):.3f}")  # fmt: skip
    if "4" in kind:  # two to four decimal digits are lost; how many depends on the LM
        assert sum(taus) / len(taus) > 0.6
    else:
        assert kendall(scores.flatten(), in_bfloat16.flatten()) >= 0.9
        assert sum(taus) / len(taus) >= (0.85 if kind == "fp8" else 0.9)


def test_a_loaded_folder_is_the_lm_that_was_saved(packed):
    kind, folder = packed
    if kind == "fp8":
        pytest.skip("fp8 needs a GPU to be saved")
    lm = qpeft.load_lm(BASE_LM, dtype="bfloat16", quantization_config=config_of(kind))
    again = qpeft.load_lm(folder)
    assert fingerprint_of(lm) == fingerprint_of(again)
    assert fingerprint_of(lm)["weights"] != fingerprint_of(qpeft.load_lm(BASE_LM, dtype="bfloat16"))["weights"]


@torch.no_grad()
def test_a_changed_weight_is_noticed(packed):
    lm = qpeft.load_lm(packed[1])
    before = LMState.of(lm).version()
    assert LMState.of(lm).version() is before
    fingerprint = before.fingerprint()
    part = list(plain_parts(lm.model.layers[0].self_attn.q_proj.weight).values())[0]
    part.view(torch.uint8).view(-1)[:1] ^= 1
    assert LMState.of(lm).version() is not before
    assert fingerprint_of(lm)["weights"] != fingerprint["weights"]


def test_an_index_is_read_and_other_weights_are_refused(packed, tmp_path):
    """Whole job: an index by one process's LM is read by another's, and not by the LM in bfloat16."""
    from qpeft_ext.cli import main

    documents = [{"_id": f"d{i}", "text": text} for i, text in enumerate(("a moon", "the tide of the sea", "a boat"))]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    index = ["index", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "index"), "--device", "cpu"]
    assert main([*index, "--base-model", str(packed[1])]) == 0
    texts = [document["text"] for document in documents]
    for name, dtype, found in ((packed[1], None, 3), (BASE_LM, "bfloat16", 0)):
        model = qpeft.get_qpeft_model(qpeft.load_lm(name, dtype=dtype), qpeft.QPeftConfig(clues="none"))
        reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(index=tmp_path / "index"))
        if not found:
            with pytest.raises(ValueError, match="the index .* was made with"):
                reranker.rank("why tides", texts)
            continue
        reranker.rank("why tides", texts)
        assert reranker.cache.tiers["index"].hits == found


def test_a_lora_that_the_query_generates_learns(packed, pairs):
    model = qpeft.get_qpeft_model(qpeft.load_lm(packed[1]), qpeft.QPeftConfig.recommended(rank=8))
    assert len(model.generated_lora.names) == 21
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    some = [(pairs[0][0], pairs[1][0])]
    before = model.score(some).query_log_likelihood
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (-model(model.encode(some)).query_log_likelihood.sum()).backward()
        optimizer.step()
    model.eval()
    assert model.score(some).query_log_likelihood > before


def test_a_lora_of_peft_is_scored(packed, pairs):
    peft = pytest.importorskip("peft", reason="LoRA in the LM needs the package peft")
    lm = qpeft.load_lm(packed[1])
    config = qpeft.QPeftConfig(clues="none")
    some = [(pairs[0][0], pairs[1][0])]
    plain = qpeft.get_qpeft_model(lm, config).score(some).query_log_likelihood
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = qpeft.get_qpeft_model(peft.get_peft_model(lm, lora), config)
    assert abs(model.score(some).query_log_likelihood - plain) > 1e-3
    assert fingerprint_of(model.lm)["adapter"]


def test_what_needs_plain_weights_is_refused(packed):
    kind, folder = packed
    if kind == "fp8" and not torch.cuda.is_available():
        pytest.skip("without a GPU, transformers unpacks fp8")
    lm = qpeft.load_lm(folder)
    with pytest.raises(ValueError, match="train_lm=True trains every weight, but .* is packed .*without quantization"):
        qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", train_lm=True))
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", generated_lora_rank=2))
    with pytest.raises(ValueError, match="merge_for: nothing can be added to .*q_proj, whose weight is packed"):
        model.merge_for("a query")
    assert model.get_nb_trainable_parameters()[1] == sum(map(count, lm.parameters())) + sum(
        p.numel() for p in model.generated_lora.parameters()
    )
    assert sum(map(count, lm.parameters())) == sum(p.numel() for p in qpeft.load_lm(BASE_LM).parameters())


def test_a_gguf_file_is_not_kept_packed(monkeypatch):
    config = pytest.importorskip("transformers.utils.quantization_config")
    if not hasattr(config, "GgufConfig"):
        pytest.skip("this version of transformers always unpacks GGUF files")
    with pytest.raises(ValueError, match="GGUF file is not kept packed.*leave quantization_config out"):
        qpeft.load_lm(BASE_LM, quantization_config=config.GgufConfig())
    with pytest.raises(ValueError, match="gguf_file is not used"):
        qpeft.load_lm("some/lm", gguf_file="lm.gguf")
    lm = qpeft.load_lm(BASE_LM, quantization_config=config.GgufConfig(dequantize=True))
    assert not any(map(is_packed, lm.parameters()))


@pytest.mark.parametrize(
    ("package", "facts"),
    [("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}), ("hqq", {"quant_method": "hqq"})],
)
def test_a_missing_package_is_said_in_one_line(package, facts, tmp_path):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"the package {package} is installed")
    folder = shutil.copytree(BASE_LM, tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": facts}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError), match=f"^cannot load the base LM .*{package}") as caught:
        qpeft.load_lm(folder)
    assert "\n" not in str(caught.value)
