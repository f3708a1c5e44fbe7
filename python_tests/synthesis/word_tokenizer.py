"""A tokenizer of whole words, for the tests of synthesis."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()


def word_tokenizer():
    """One token per word of `WORDS`, which keeps the spaces; </s> ends."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"▁{word}": i for i, word in enumerate(WORDS, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
