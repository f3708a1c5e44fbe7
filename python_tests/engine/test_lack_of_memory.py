"""An engine that is made while memory is short says so; it is not made with other passes than the LM can have."""

import pytest
from families.tiny import tiny_lm, tiny_tokenizer
from torch.overrides import TorchFunctionMode

import qpeft_ext as qpeft

LACK = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


class Lacking(TorchFunctionMode):
    """Lets calls of torch's functions fail from one on; ``calls`` counts them."""

    def __init__(self, first: float, last: float) -> None:
        super().__init__()
        self.first, self.last, self.calls = first, last, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        if self.first <= self.calls <= self.last:
            raise RuntimeError(LACK)
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_check_takes_a_lack_of_memory_for_an_answer(family):
    """One call at a time fails, as where another process has the memory for a moment."""
    lm, tokenizer, config = tiny_lm(family), tiny_tokenizer(), qpeft.QPeftConfig(clues="none")
    qpeft.get_qpeft_model(lm, config, tokenizer)  # what is found out once for all models
    with Lacking(0, -1) as counting:
        qpeft.get_qpeft_model(lm, config, tokenizer)
    assert counting.calls > 1000
    for number in range(1, counting.calls, counting.calls // 30):
        with pytest.raises(RuntimeError, match="can't allocate memory") as error, Lacking(number, number):
            qpeft.get_qpeft_model(lm, config, tokenizer)
        assert type(error.value) is RuntimeError, f"call {number} of {counting.calls}"


def test_what_onednn_refuses_is_an_answer(monkeypatch):
    """It refuses a dtype that it does not know with the words that it has for a lack of memory."""
    lm = tiny_lm("llama")

    def refuse(*arguments, **keywords):
        raise RuntimeError("could not create a primitive descriptor for a matmul primitive")

    monkeypatch.setattr(type(lm), "forward", refuse)
    with pytest.raises(ValueError, match="this llama LM cannot be used: RuntimeError: could not create a primitive"):
        qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
