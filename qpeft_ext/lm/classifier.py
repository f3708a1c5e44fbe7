"""Rerankers that are sequence classifiers: a causal LM with a linear head on its last token, in the place of words."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

_KIND = "ForSequenceClassification"


def is_classifier(lm: object) -> bool:
    """Tell whether a model is a sequence classifier of transformers."""
    return _KIND in type(lm).__name__


def names_classifier(config: Any) -> bool:
    """Tell whether a model was saved as a sequence classifier, by its config."""
    return any(str(name).endswith(_KIND) for name in getattr(config, "architectures", None) or ())


class ClassifierLM(nn.Module):
    """A sequence classifier as a causal LM with as many words as there are classes.

    Its head gives logits at every token; the classifier's are those at the last one.

    Args:
        classifier: ``AutoModelForSequenceClassification`` on a causal LM.
    Attributes:
        yes, no: the classes that say that a document is relevant, and that it is not; with one class there is no other.
    Raises: ValueError for an encoder-only classifier, another head, or more than two classes.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        head = getattr(classifier, "score", None)
        kind = type(classifier).__name__
        if not isinstance(head, nn.Linear) or classifier.base_model is classifier:
            raise ValueError(
                f"{kind} is an encoder-only classifier, or has a head of its own; expected a causal LM with a linear "
                "head on its last token (Qwen3ForSequenceClassification, …): use sentence-transformers' CrossEncoder"
            )
        if head.out_features not in (1, 2):
            raise ValueError(f"{kind} has {head.out_features} classes; expected one, or two (not relevant, relevant)")
        self.yes: tuple[int, ...] = (head.out_features - 1,)
        self.no: tuple[int, ...] = (0,) if head.out_features == 2 else ()
        self.config, self.name_or_path = classifier.config, classifier.name_or_path

    def get_base_model(self) -> Any:
        """Return the classifier, as a `peft` model returns the LM that it is around."""
        return self.classifier

    def get_decoder(self) -> nn.Module:
        """Return the module that gives hidden states."""
        return self.classifier.base_model

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds tokens."""
        return self.classifier.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, [classes, D]."""
        return self.classifier.score

    def forward(self, logits_to_keep: Tensor | int = 0, **given: Any) -> CausalLMOutputWithPast:
        """Compute logits of all classes at every token, [B, L, classes], or those of the tokens that are kept.

        Args:
            logits_to_keep: as for a causal LM: bool [B, L], or 0 for all.
            given: of the decoder.
        """
        hidden = self.get_decoder()(**given).last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[logits_to_keep]
        return CausalLMOutputWithPast(logits=self.classifier.score(hidden))


def as_lm(model: Any) -> Any:
    """Return the model, a sequence classifier as a `ClassifierLM`. Raises: as `ClassifierLM`."""
    return ClassifierLM(model) if is_classifier(model) else model
