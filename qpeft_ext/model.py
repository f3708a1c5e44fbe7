"""`QPeftModel`: a frozen LM, its prompt and its trained modules, made from a config or loaded from a folder."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from .adapters.attention_clues import AttentionClues
from .adapters.filters import allowed_ids
from .adapters.generated_lora import GeneratedLora
from .adapters.mixed_score import MixedScore
from .adapters.soft_prompt import build_soft_prompt
from .adapters.top_k_clues import TopKClues
from .config import QPeftConfig
from .config.rerankers import RERANKERS
from .engine.answers import Answer, Grades
from .engine.base import BaseEngine
from .engine.factory import make_engine
from .engine.scores import CountTokens, Scores, count_all_tokens
from .engine.scoring import ScoringModel
from .engine.turns import in_passes
from .lm.arguments import expect_lm_arguments, freeze, without_compilation
from .lm.classifier import ClassifierLM, as_lm
from .lm.packed import count
from .lm.passes import lm_lock
from .official.clues import build_official_clues
from .official.likelihood import count_uncertain_tokens
from .official.prompt import OfficialPrompt
from .prompts.prompt import Prompt
from .prompts.templates import BY_NAME
from .prompts.worded import WordedPrompt
from .utils.torch_state import own_state

__all__ = ["QPeftModel", "Scores", "get_qpeft_model"]

CLUES_FIRST_IS_PLAIN = "layout='clues_first' puts the clues, which depend on the query, before the document"


class QPeftModel(ScoringModel):
    """A frozen LM with the trained modules of Q-PEFT.

    Make it with `get_qpeft_model`, or load it with `from_pretrained`. The LM is a causal or an encoder–decoder LM of
    transformers, or a `peft` model of one. It is frozen (unless ``train_lm``) and stays in eval mode; what a pass
    changes in it is restored after every pass. Precision is that of its weights: `torch.autocast`, the default dtype
    and inference mode change no score, and ``model.to(dtype)`` changes the LM only, because the trained modules have
    float32 weights.

    Passes of several threads take turns. A thread that calls the LM itself meanwhile gets what it always gets; a thread
    that changes the LM (weights, adapters, device, dtype) does so inside `exclusive`.

    Args:
        lm: the language model.
        config: every option.
        tokenizer: the LM's tokenizer.
    Attributes:
        lm: the language model.
        qpeft_config: the config, with the options that depend on the LM filled in.
        clues, generated_lora, soft_prompt, mixed_score: the trained modules; None where the config has none.
    Raises: ValueError for an LM that does not fit the config, or whose weights are on the meta device; TypeError for
        arguments that are no LM, no config or no tokenizer.
    """

    def __init__(self, lm: nn.Module, config: QPeftConfig, tokenizer) -> None:
        super().__init__()
        expect_lm_arguments("QPeftModel", lm, config, tokenizer)
        lm = as_lm(without_compilation(lm))
        with lm_lock(lm), own_state():
            freeze(lm, config.train_lm)
            self._build(lm, config, tokenizer)

    def _build(self, lm: nn.Module, config: QPeftConfig, tokenizer) -> None:
        self.lm = lm
        self.tokenizer = tokenizer
        self.clues = self.generated_lora = self.soft_prompt = self.mixed_score = None
        self.qpeft_config = config
        self.engine = self._probed_engine()
        self.qpeft_config = config = config.resolve(self.engine.table.shape[1])
        self.prompt = build_prompt(tokenizer, config, self.engine.is_encoder_decoder, not isinstance(lm, ClassifierLM))
        self.qpeft_config = config = replace(config, special_tokens=self.prompt.special_tokens)
        self.prompt.expect_rows(len(self.engine.table), self.engine.head.rows)
        with torch.random.fork_rng(devices=[]):  # one seed gives one clue module, whatever was drawn before
            torch.default_generator.manual_seed(config.seed)
            self.clues = build_clues(config, self.engine.table, tokenizer)
            if config.generated_lora_rank:
                width = self.engine.table.shape[1]
                self.generated_lora = GeneratedLora(lm, width, config.generated_lora_rank, config.target_modules,
                                                    self.engine.decoder)  # fmt: skip
            self.soft_prompt = build_soft_prompt(
                config, self.prompt, self.engine.table, self.engine.scale, self.engine.context
            )
        self.engine = self.engine.with_soft_prompt(self.soft_prompt)
        self._count_tokens = build_token_count(config, tokenizer)
        self.ranks_by_mean = config.compat == "official" or config.score != "likelihood"
        self.answer = build_answer(config, self.prompt, lm)
        self.mixed_score = MixedScore() if config.score == "both" else None
        self.to_device_of_lm()
        self.eval()

    def _probed_engine(self) -> BaseEngine[Any, Any]:
        why_not_cached = CLUES_FIRST_IS_PLAIN if self.qpeft_config.layout == "clues_first" else ""
        engine = make_engine(self.lm, why_not_cached).with_soft_prompt(self.soft_prompt)
        self._lm_parts = engine.lm_parts()
        return engine

    def to_device_of_lm(self) -> None:
        """Move the trained modules to the device of the LM's embeddings."""
        for module in self.trained_modules.values():
            module.to(self.engine.device)

    @property
    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules that an adapter consists of, by the prefix of their keys in the adapter file."""
        parts = {
            "": self.clues,
            "generated_lora.": self.generated_lora,
            "soft_prompt.": self.soft_prompt,
            "mixed_score.": self.mixed_score,
        }
        return {prefix: module for prefix, module in parts.items() if module is not None}

    def train(self, mode: bool = True) -> QPeftModel:
        """Set train mode for the trained modules and for dropout inside trained adapters of the LM.

        The LM itself stays in eval mode, and so do adapters that are not trained: their dropout would end up in cached
        prefixes.

        Args:
            mode: whether to train; False is eval mode.
        Returns: the model.
        """
        super().train(mode)
        self.lm.eval()
        for module in self.lm.modules():
            if isinstance(dropout := getattr(module, "lora_dropout", None), nn.Module):
                dropout.train(mode and any(p.requires_grad for p in module.parameters()))
        return self

    @in_passes
    def merge_for(self, query: str) -> dict[str, Tensor]:
        """Compute the weights with which the LM reads suffixes for one query; prefixes are read with the LM's own.

        Args:
            query: a string.
        Returns: tensors by the name of the LM's parameter that they take the place of.
        Raises: ValueError without a generated LoRA.
        """
        if self.generated_lora is None:
            raise ValueError("merge_for: the model has no generated LoRA; set generated_lora_rank in QPeftConfig")
        return self.generated_lora.merged(self.prompt.queries([query])[0], self.engine.table)

    # -- parameters and files ------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the trainable parameters, and all parameters of the LM and the trained modules.

        Returns: (trainable, all).
        """
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(map(count, self.parameters()))

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, in the form that `peft` has."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the trained modules, their config and a model card.

        Writes ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``, each of which appears whole or
        not at all; the adapter of a `peft` model in ``lm_adapter``; with ``train_lm`` LM and tokenizer in ``lm``.

        Args:
            folder: made if it is not there.
        Raises: ValueError if a weight is not finite, or ``folder`` is not a folder; OSError if it cannot be written.
        """
        from .adapters.files import save_adapter

        save_adapter(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the adapter to the Hugging Face Hub: the files of `save_pretrained`.

        Args:
            repo_id: "owner/name"; the repository is created if it is not there.
            kwargs: for `huggingface_hub.HfApi.create_repo`, such as ``private`` or ``token``.
        Returns: the URL of the commit.
        Raises: as `save_pretrained`; what `huggingface_hub` raises without a login or a network.
        """
        from .adapters.files import push_adapter

        return push_adapter(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        lm: nn.Module | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        is_trainable: bool = False,
        max_document_tokens: int | None = None,
        max_query_tokens: int | None = None,
        **lm_kwargs: Any,
    ) -> Self:
        """Load an adapter and, unless it is given, its LM.

        Args:
            folder: of `save_pretrained`, or the name of a repository on the Hugging Face Hub.
            lm: the LM, or its name as for `load_lm`; None: the LM that the adapter's config names.
            tokenizer: the LM's tokenizer; None: loaded from the name of the LM.
            is_trainable: whether the adapter is to be trained further; otherwise it is frozen.
            max_document_tokens, max_query_tokens: limits in place of the config's; None keeps those.
            lm_kwargs: for `load_lm`: ``dtype``, ``device``, ``attention``, ``revision``, ….
        Returns: the model, in eval mode.
        Raises: FileNotFoundError for a missing file; ValueError for a damaged one, for weights that do not fit the
            config or are not finite, and for another LM than the adapter was trained on.

        Example:
            >>> from pathlib import Path
            >>> import qpeft_ext as qpeft
            >>> demo = Path(qpeft.__file__).parent / "demo"
            >>> model = qpeft.QPeftModel.from_pretrained(demo / "adapter", lm=demo / "base_lm")
            >>> pairs = [("read a json file", "def load(path): return json.loads(path.read_text())")]
            >>> scores = model.score(pairs)
            >>> [round(score, 1) for score in scores.query_log_likelihood.tolist()]  # nats, larger is better
            [-10.6]
        """
        from .adapters.files import load_adapter

        limits = {"max_document_tokens": max_document_tokens, "max_query_tokens": max_query_tokens}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        return load_adapter(cls, folder, lm, tokenizer, is_trainable, limits, **lm_kwargs)


def get_qpeft_model(lm: nn.Module, config: QPeftConfig, tokenizer: Any = None) -> QPeftModel:
    """Add new trained modules to an LM.

    The LM may be used elsewhere too, in other threads as well: it is restored after every pass. A thread that changes
    it while another scores does so inside `QPeftModel.exclusive`.

    Args:
        lm: a causal or an encoder–decoder LM of transformers, or a `peft` model of one. It is put into eval mode and
            its parameters are frozen, or trained with ``train_lm``; those of a `peft` adapter stay as they are.
        config: every option: the clue module, the prompt, the limits, the loss.
        tokenizer: the LM's tokenizer; None: loaded from ``lm.name_or_path``.
    Returns: the model, in eval mode.
    Raises: ValueError for an LM that is neither causal nor encoder–decoder, or does not fit the config; TypeError for
        arguments that are no LM (a name, a pipeline, a classifier, swapped arguments), with the right call.

    Example:
        >>> from pathlib import Path
        >>> import qpeft_ext as qpeft
        >>> lm = qpeft.load_lm(Path(qpeft.__file__).parent / "demo" / "base_lm")
        >>> model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", rank=8))
        >>> model.print_trainable_parameters()
        trainable params: 3,272 || all params: 1,970,696 || trainable%: 0.1660
    """
    expect_lm_arguments("get_qpeft_model", lm, config, tokenizer)
    from .adapters.own_lm import describe_lm
    from .lm.loading import load_tokenizer

    name = getattr(lm, "name_or_path", None) or getattr(lm.config, "_name_or_path", None) or None
    if tokenizer is None:
        if not name:
            raise ValueError("get_qpeft_model: tokenizer must be given, because the LM has no name_or_path")
        tokenizer = load_tokenizer(name, revision=getattr(lm.config, "_commit_hash", None))
    config = replace(config, base_model_name_or_path=config.base_model_name_or_path or name)
    model = QPeftModel(lm, config, tokenizer)
    facts = describe_lm(model.engine)
    if config.base_model_name_or_path != name:
        facts.pop("revision", None)  # which belongs to the name that the LM was loaded by
    model.qpeft_config = replace(model.qpeft_config, base_model=facts)
    return model


def build_prompt(tokenizer, config: QPeftConfig, encoder_decoder: bool = False, with_words: bool = True) -> Prompt:
    """Make the prompt of a config.

    Args:
        tokenizer: of the LM.
        config: every option.
        encoder_decoder: whether the LM is an encoder–decoder.
        with_words: whether its head has words; a classifier's has classes.
    Raises: ValueError for an option that encoder–decoder LMs do not have.
    """
    for name, value in (("layout", "document_first"), ("compat", "none")):
        if encoder_decoder and getattr(config, name) != value:
            raise ValueError(
                f"QPeftConfig: {name}={getattr(config, name)!r} is for causal LMs, this one is an "
                f"encoder–decoder; leave {name} out"
            )
    if encoder_decoder and config.template == "chat":
        raise ValueError(
            "QPeftConfig: template='chat' is for causal LMs, this one is an encoder–decoder; use template='upr'"
        )
    if config.compat == "official":
        return OfficialPrompt(tokenizer, config)
    if config.template not in BY_NAME:
        return WordedPrompt(tokenizer, config, encoder_decoder, with_words)
    return Prompt(tokenizer, config, encoder_decoder, with_words)


def build_token_count(config: QPeftConfig, tokenizer) -> CountTokens:
    """Choose the function that counts the tokens of a score."""
    return partial(count_uncertain_tokens, decode=tokenizer.decode) if config.compat == "official" else count_all_tokens


def build_answer(config: QPeftConfig, prompt: Prompt, lm: nn.Module) -> Answer | Grades | None:
    """Choose what is read behind a query, or behind a document; None where the query itself is scored.

    Args:
        config: every option.
        prompt: the prompt of the config.
        lm: the LM; a classifier answers with its classes.
    Raises: ValueError for a classifier with another score than "yes_no".
    """
    if isinstance(lm, ClassifierLM):
        if config.score != "yes_no":
            raise ValueError(
                f"score={config.score!r} reads words, but this LM is a classifier without words; set template to the "
                f"one that it was trained with ({', '.join(RERANKERS)}, or a file)"
            )
        return Answer(lm.yes, lm.no)
    if not prompt.answers:
        return None
    return Grades(prompt.answers) if config.score == "graded" else Answer(*prompt.answers)


def build_clues(config: QPeftConfig, table: Tensor, tokenizer) -> nn.Module | None:
    """Make the clue module of a config; None for ``clues="none"``.

    Args:
        config: a resolved one (`QPeftConfig.resolve`).
        table: the LM's input embeddings, [V, D].
        tokenizer: of the LM.
    """
    if config.clues == "none":
        return None
    if config.compat == "official":
        return build_official_clues(config, table, tokenizer)
    if config.clues == "attention" and not config.filters:
        return AttentionClues(config, table.shape[1])
    allowed = allowed_ids(tokenizer, len(table), config.filters)
    if config.clues == "attention":
        return AttentionClues(config, table.shape[1], allowed)
    return TopKClues(config, table, allowed)
