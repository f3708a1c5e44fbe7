"""UPR beside an adapter that has trained the LM itself: it is the LM as it was before."""

import json
import shutil

import pytest
import torch
from cli.in_process import run_command
from jobs.tiny_job import save_adapter

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.ranking.systems import Systems, SystemsSpec

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["lora", "train_lm"])
def test_upr_beside_an_adapter_that_has_trained_the_lm(kind, job, tmp_path, capsys):
    """It is the LM as it was before, as it is without the adapter."""
    base, adapter, data = tmp_path / "base", tmp_path / "adapter", job / "data"
    shutil.copytree(job / "lm", base)
    model = qpeft.QPeftModel.from_pretrained(save_adapter(tmp_path / "other", base, clues="none", rank=None,
                                                          train_lm=True))  # fmt: skip
    if kind == "lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        lm = peft.get_peft_model(qpeft.load_lm(base), lora)
        model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), model.tokenizer)
    else:
        with torch.no_grad():
            for weight in model.lm.parameters():
                weight.mul_(1.5)
    model.save_pretrained(adapter)
    capsys.readouterr()  # transformers' bars
    where = ("rerank", "--data", data, "--run", data / "run.trec", "--device", "cpu", "--output")
    run_command(capsys, *where, tmp_path / "upr.trec", "--base-model", base, "--upr", "--measures", "RR@10")
    spec = SystemsSpec(str(data), model=str(adapter), upr=True)
    systems, plain = Systems(spec, "cpu"), Systems(SystemsSpec(str(data), base_model=str(base), upr=True), "cpu")
    pairs = [("why do tides rise", "The sea rises and falls."), ("moon month", "Wind makes waves.")]
    expected = plain.rerankers["UPR"].predict(pairs)
    assert systems.rerankers["UPR"].predict(pairs).tolist() == expected.tolist()
    assert abs(systems.rerankers[spec.names[0]].predict(pairs) - expected).max() > 1e-3
    index = ("index", data, "--model", adapter, "--out", tmp_path / "index")
    run_command(capsys, *index)
    out = run_command(capsys, *where, tmp_path / "a.trec", "--model", adapter, "--upr", "--index", tmp_path / "index")
    assert "UPR: 3 queries" in out
    settings = json.loads((tmp_path / "a.trec.json").read_text())["settings"]
    assert settings["LM of UPR"] == json.loads((tmp_path / "upr.trec.json").read_text())["settings"]["base model"]
    shutil.rmtree(base)
    assert main([str(x) for x in (*where, tmp_path / "b.trec", "--model", adapter, "--upr")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (kind == "lora" or "--upr takes the LM before training: " in err)
