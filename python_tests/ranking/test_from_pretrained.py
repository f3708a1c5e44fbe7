"""`Reranker.from_pretrained` and `from_lm`: every option of a `Reranker` can be given, and none is ignored."""

import inspect

import pytest
import torch

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import BASE_LM

ADAPTER = BASE_LM.parent / "adapter"
PAIR = ("read a json file", "def load(path): return json.loads(path.read_text())")


@pytest.mark.parametrize("make", [qpeft.Reranker.from_pretrained, qpeft.Reranker.from_lm])
def test_no_argument_hides_an_option(make):
    options = set(inspect.signature(qpeft.Reranker).parameters) - {"model"}
    assert "path" in options and not options & set(inspect.signature(make).parameters)


def test_the_plain_path():
    plain, shared = (
        qpeft.Reranker.from_pretrained(ADAPTER, BASE_LM, dtype="float32", path=path)
        for path in ("plain", "document_first")
    )
    assert plain.path == "plain" and shared.path == "document_first" and plain.adapter == str(ADAPTER)
    assert plain.predict(PAIR) == pytest.approx(shared.predict(PAIR), abs=1e-4)


def test_the_dtype_in_lm_kwargs_is_taken():
    stored = qpeft.load_lm(BASE_LM).dtype
    assert stored != torch.float64
    for arguments in ({"lm_kwargs": {"dtype": "float64"}}, {"dtype": "float64", "lm_kwargs": {"dtype": "float64"}}):
        reranker = qpeft.Reranker.from_pretrained(ADAPTER, BASE_LM, **arguments)
        assert reranker.model.lm.dtype == torch.float64
        assert qpeft.Reranker.from_lm(BASE_LM, "upr", **arguments).model.lm.dtype == torch.float64
    for make in (qpeft.Reranker.from_pretrained, qpeft.Reranker.from_lm):
        with pytest.raises(ValueError, match="dtype is 'float32', and 'float64' in lm_kwargs; give it once"):
            make(BASE_LM, dtype="float32", lm_kwargs={"dtype": "float64"})


@pytest.mark.parametrize(
    ("name", "value"), [("dtype", "float64"), ("device", "cpu"), ("lm_kwargs", {"attention": "eager"})]
)
def test_an_lm_that_is_loaded_is_not_loaded_otherwise(name, value):
    lm = qpeft.load_lm(BASE_LM)
    named = next(iter(value)) if isinstance(value, dict) else name
    match = f"{named}=.* is for an LM that is loaded by its name, and this one is loaded; leave {named} out"
    with pytest.raises(ValueError, match=match):
        qpeft.Reranker.from_pretrained(ADAPTER, lm, **{name: value})
    with pytest.raises(ValueError, match=match):
        qpeft.Reranker.from_lm(lm, "upr", **{name: value})
    keywords = value if isinstance(value, dict) else {name: value}
    with pytest.raises(ValueError, match=match):
        qpeft.QPeftModel.from_pretrained(ADAPTER, lm, **keywords)


@pytest.fixture
def no_lm(monkeypatch):
    """Loading an LM is too late for what is wrong already."""

    def load(*_, **__):
        raise AssertionError("an LM is loaded")

    for name in ("qpeft_ext.adapters.files.load_lm", "qpeft_ext.ranking.reranker.load_lm"):
        monkeypatch.setattr(name, load)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"passage": "max"}, TypeError, "there is no option 'passage'; did you mean 'passages'?"),
        ({"revision": "v2"}, TypeError, "there is no option 'revision'; what load_lm shall get goes into lm_kwargs"),
        ({"adapter": None}, TypeError, "the adapter must be a folder or a Hub id, got None"),
        ({"adapter": ""}, TypeError, "the adapter must be a folder or a Hub id, got the string ''"),
        ({"base_model": 5}, TypeError, "lm must be a causal or an encoder–decoder LM, got int 5"),
    ],
)
def test_what_is_wrong_is_known_before_the_lm_is_loaded(arguments, kind, message, no_lm):
    with pytest.raises(kind) as raised:
        qpeft.Reranker.from_pretrained(**{"adapter": ADAPTER, "base_model": BASE_LM} | arguments)
    assert message in str(raised.value)
    if not {"adapter", "base_model"} & arguments.keys():
        with pytest.raises(kind, match=f"from_lm: {message.partition(';')[0]}"):
            qpeft.Reranker.from_lm(BASE_LM, "upr", **arguments)


def test_an_empty_name_is_not_the_adapters_lm(tmp_path):
    """A variable of a shell that is unset must not bring another LM, or leave the adapter out."""
    with pytest.raises(ValueError, match="cannot load the base LM '': the name is empty"):
        qpeft.Reranker.from_pretrained(ADAPTER, "")
    with pytest.raises(ValueError, match="cannot load the base LM '': the name is empty"):
        qpeft.load_lm("")


def test_a_device_that_is_not_there_is_known_before_the_weights_are_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("the weights are read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(ValueError, match="the device 'cuba' cannot be used"):
        qpeft.load_lm(BASE_LM, device="cuba")
