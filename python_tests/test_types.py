"""Types that a user's program sees: the package ships ``py.typed``, and its names are imported on first use."""

import importlib
import re
from pathlib import Path

import pytest

import qpeft_ext as qpeft

ROOT = Path(qpeft.__file__).parents[1]
FACES = ("adapters", "evaluation", "lm", "prefixes", "ranking", "training")
PROGRAM = """
import qpeft_ext as qpeft
from qpeft_ext import evaluation, prefixes
from qpeft_ext.training import losses

model = qpeft.QPeftModel.from_pretrained("adapter")
reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20))
reveal_type(model)
reveal_type(reranker.rank("a query", ["a document"]))
reveal_type(qpeft.__version__)
reveal_type(evaluation.evaluate({}, {}))
reveal_type(prefixes.PrefixIndex)
reveal_type(losses)
qpeft.QPeftConfig(k="ten")
qpeft.Rerankr
"""


@pytest.mark.slow
def test_a_users_program_is_checked(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # without torch's own types, whose reading takes a minute; ours must be seen all the same
    options = ["--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "--config-file="]
    out, err, _ = api.run([str(program), *options, f"--cache-dir={tmp_path / 'cache'}"])
    assert err == ""
    types = re.findall(r'Revealed type is "(.*)"', out)
    assert [types[0], types[2], types[3]] == [
        "qpeft_ext.model.QPeftModel",
        "str",
        "qpeft_ext.evaluation.measures.Evaluation",
    ]
    assert types[1].startswith("list[dict[")
    assert types[4].endswith("-> qpeft_ext.prefixes.index.PrefixIndex")
    assert types[5] == "types.ModuleType"
    errors = re.findall(r"error: (.*)", out)
    assert errors[0] == 'Argument "k" to "QPeftConfig" has incompatible type "str"; expected "int"  [arg-type]'
    assert errors[1].startswith('Module has no attribute "Rerankr"')
    assert len(errors) == 2, out


@pytest.mark.parametrize("face", ["", *FACES])
def test_what_a_face_exports_is_there_and_has_a_type(face):
    module = importlib.import_module(f"qpeft_ext.{face}".rstrip("."))
    typed = re.findall(r"import \w+ as (\w+)", Path(module.__file__).read_text())
    assert sorted(typed) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing
