"""`QPeftConfig`, the options of the method, and which of them exclude each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.small_files import read_json
from ..utils.text import shorten
from ..utils.words import did_you_mean
from .combinations import CHECKS
from .recommended import recommended_options
from .templates import decided_by_template, template_text
from .values import DEFAULT_INSTRUCTION, OFFICIAL, OFFICIAL_INSTRUCTION, at_least, check_values, names_of


@dataclass
class QPeftConfig:
    """Options of Q-PEFT: its clues, its prompt and how it is trained.

    Without arguments it is Q-PEFT-A with the objective of the paper. `recommended` gives the options that ranked best
    in our experiments.

    The first options choose and shape the clues (up to ``score_gate``), the next add to them (the generated LoRA, the
    soft prompt, ``train_lm``), then come the prompt and its limits, and last what only training reads.

    Args:
        clues: The clue module: "attention" (Q-PEFT-A, the default), "top_k" (Q-PEFT-R), or "none" (UPR, which trains
            nothing).
        k: Number of clues per pair for "top_k" (default 10). A document with fewer distinct tokens gives fewer clues.
        num_heads: Number of attention heads for "attention" (default 8). It divides the embedding width D.
        rank: Inner width of the clue MLP and of the low-rank projections. "auto" (the default) is min(256, D); None
            trains full matrices.
        residual: Whether the clue MLP has a residual path, so that training starts at the clue tokens themselves
            (default True). Without it, for comparison, training starts at random vectors.
        attention_bias: Whether the four projections of "attention" have biases (default True).
        dropout: Dropout on the output of the clue attention in training (default 0.0).
        filters: Document tokens that never become clues or receive attention: any of "query_tokens", "stop_words" and
            "non_alphabetic" (default none).
        source: Where the clues of "top_k" are taken from. "document" (the default, as in the paper) is the document of
            the pair. "candidates" is all documents of the query together: they give one list of clues, so a score
            depends on the list, and only `Reranker.rank` accepts it; in training the list is the example's own.
            "vocabulary" takes one list per query from the whole vocabulary. "vocabulary_per_token" takes the k
            nearest neighbours of each query token, without the token itself.
        similarity: Similarity of embeddings for "top_k": "cosine" (the default) or "dot".
        selection: How "top_k" chooses: by "similarity" (the default), or "random", by a hash of ``seed``, query and
            document (the paper's ablation).
        clue_embeddings: Embeddings of the chosen tokens for "top_k": "frozen" (the LM's table E, the default),
            "low_rank" (E + A·B, where A·B has ``rank`` and is trained), or "full" (a trained copy of E, which has
            131 M parameters for Llama-2-7B).
        score_gate: Whether the choice of "top_k" is trained too (default False). A low-rank projection of the query's
            embeddings then scores the tokens, and the scores weigh the clue vectors. Training chooses 2k clues, and
            scoring chooses k.
        generated_lora_rank: Rank of a low-rank update of the LM that the query generates (`GeneratedLora`); None (the
            default) for no update. It applies to the query suffix only and combines with every kind of clues.
        target_modules: Linear layers that the generated LoRA updates: endings of their names as in `peft`, or
            "all-linear". None (the default) takes q_proj and v_proj, or their counterparts in the LM.
        layout: "document_first" (the default); "clues_first" for comparison: the clues stand before the passage, so
            that queries cannot share a prefix and every pair is read whole, and a generated LoRA applies to the tokens
            behind the passage. "query_first" is that of templates with the query first, whose prefix is the query's.
        compat: "none" (the default), or "official" to compose prompt, clues and score as the official code does,
            including its faults (listed in `qpeft_ext.official`). It needs Llama's tokenizer.
        template: "qpeft" (the default), or "upr" for the prompt of UPR, ``Passage: {title} {text}. Please write a
            question based on this passage.``, with UPR's score: for an encoder–decoder LM it includes every token
            that the tokenizer makes of the query, ``</s>`` too. Clues stand before the full stop. "chat" writes the
            prompt in the chat template of the LM's tokenizer: the user's turn has instruction, passage, clues and the
            instruction again, and the query is the assistant's turn, of which the end is not scored. Those of rerankers
            that exist, without clues, are "qwen3_reranker", "mxbai_rerank", "flag_reranker" (FlagEmbedding's) and
            "pair" (classifiers of two texts). Anything else is a file of Jinja2 with ``query``, ``document`` and
            perhaps ``instruction``, or its text, which an adapter keeps.
        special_tokens: What stands before a prompt. "tokenizer": the special tokens that the LM's tokenizer puts
            before a text. "bos": its BOS token, if it has one, even if it does not put it there; an adapter that was
            saved before this option existed is loaded with it. "auto" (the default) is "tokenizer"; an adapter keeps
            which of the two it was trained with. Encoder–decoder LMs always read what their tokenizer makes, and the
            template "chat" what the chat template writes.
        train_lm: Whether all weights of the LM are trained and saved with the adapter (default False). This full
            fine-tuning, for comparison, needs clues="none" and an LM that is loaded in float32.
        score: What documents are ranked by. "likelihood" (the default) is the log-likelihood of the query. "yes_no"
            asks behind the query whether the document is relevant, and is the log-odds of the words for yes and no.
            "graded" asks for a grade from 0 to ``max_grade``, and is the expected one. "both" is the mean
            log-likelihood per query token plus the log-odds times a weight that is trained, from one pass. A template
            whose query is the LM's answer ("chat") has no place to ask.
        ask: Text behind the query that the answer follows. None (the default) is "Relevant:", and for "graded"
            "Relevance from 0 to 4:", with its ``max_grade``.
        yes_words, no_words: Words that answer yes and no (default "yes" and "no"), each a single token of the LM. The
            probabilities of the words of a set are added up. Without a word for no, the score is the logit of yes.
        exact_words: Whether a word, or a grade, is read as it is written only; a space before it counts. With False
            (the default) every casing of it is read that is a single token, with a space before it and without.
        max_grade: Largest grade of "graded" (default 4).
        instruction: Text at the start of every prompt of the templates "qpeft" and "chat", and where other templates
            write it; their default is their own, or none.
        num_virtual_tokens: Length of a soft prompt: trained virtual tokens that replace the instruction in every
            prompt. None (the default) for no soft prompt. It combines with every kind of clues; with "none" it is
            prompt tuning.
        soft_prompt_init: Initial values of the virtual tokens: "text" (the default) repeats or cuts the tokens of the
            instruction, "random" draws tokens of the vocabulary with ``seed``.
        soft_prompt_mlp: Inner width of an MLP that re-parameterises the soft prompt and starts as the identity; None
            (the default) for no MLP.
        allow_special_tokens: Whether the words of a special token (``</s>``, ``<|im_start|>``) in a document or query
            become that token. With False (the default) they are read as text. An adapter that was saved before this
            option existed is loaded with True.
        max_document_tokens: Longest document, title and text together, in tokens (default 256). A longer one is cut at
            its end.
        max_query_tokens: Longest query in tokens (default 64). A longer one is an error.
        queries_per_group: Number of queries that are trained together and share their documents (default 4).
        num_hard_negatives: Number of its own negatives that each query brings to a training step (default 1).
        num_random_negatives: Number of documents of other examples that are drawn for each query as further negatives
            (default 0).
        in_batch_negatives: Whether the documents of the group's other queries are negatives too (default True).
        loss: "pointwise_pairwise" (the paper's, the default; a score that is not "likelihood" has "listwise" in its
            place), "pointwise", "pairwise", "listwise", "contrastive" (in both directions, within a group),
            "binary_cross_entropy" (of "yes_no"), "ranknet", "lambda_loss" (pairs by what they are worth in nDCG), or,
            from teacher scores in the examples, "margin_mse" or "kl_divergence".
        margin: Margin of the pairwise loss in nats per query token (default 0.0).
        temperature: Nats per query token that "listwise" and the losses after it divide by, except
            "binary_cross_entropy". With "auto" (the default) `QPeftTrainer` finds the value that suits the LM before
            training and stores it here.
        suffix_micro_batch: Number of pairs whose suffix activations are kept at once in training; those of the other
            pairs are computed again in the backward pass. None (the default) keeps all of them.
        seed: Seed of initial weights, of the order of the examples, and of all that is drawn (default 0).
        base_model_name_or_path: Name of the LM that the adapter belongs to; `get_qpeft_model` fills it in.
        base_model: Description of that LM, by which another LM is refused; `get_qpeft_model` fills it in.
        calibration: How log-likelihoods become relevances in [0, 1] (`evaluation.calibration.Calibration`); None (the
            default) for a fixed map. `qpeft calibrate` fills it in.
        peft_type: Always "QPEFT", by which an adapter's file is recognised.

    Raises:
        TypeError: For a value of another type.
        ValueError: For an unknown or impossible value, or for options that exclude each other.

    Example:
        >>> from qpeft_ext import QPeftConfig
        >>> config = QPeftConfig(clues="top_k", k=5)
        >>> config.clues, config.k, config.loss
        ('top_k', 5, 'pointwise_pairwise')
        >>> QPeftConfig(clues="topk")
        Traceback (most recent call last):
            ...
        ValueError: QPeftConfig: clues must be one of attention, top_k, none, got 'topk'; did you mean 'top_k'?
    """

    clues: str = "attention"
    k: int = 10
    num_heads: int = 8
    rank: int | str | None = "auto"
    residual: bool = True
    attention_bias: bool = True
    dropout: float = 0.0
    filters: tuple[str, ...] = ()
    source: str = "document"
    similarity: str = "cosine"
    selection: str = "similarity"
    clue_embeddings: str = "frozen"
    score_gate: bool = False
    generated_lora_rank: int | None = None
    target_modules: tuple[str, ...] | None = None
    layout: str = "document_first"
    compat: str = "none"
    template: str = "qpeft"
    special_tokens: str = "auto"
    train_lm: bool = False
    score: str = "likelihood"
    ask: str | None = None
    yes_words: tuple[str, ...] = ("yes",)
    no_words: tuple[str, ...] = ("no",)
    exact_words: bool = False
    max_grade: int = 4
    instruction: str = DEFAULT_INSTRUCTION
    num_virtual_tokens: int | None = None
    soft_prompt_init: str = "text"
    soft_prompt_mlp: int | None = None
    allow_special_tokens: bool = False
    max_document_tokens: int = 256
    max_query_tokens: int = 64
    queries_per_group: int = 4
    num_hard_negatives: int = 1
    num_random_negatives: int = 0
    in_batch_negatives: bool = True
    loss: str = "pointwise_pairwise"
    margin: float = 0.0
    temperature: float | str = "auto"
    suffix_micro_batch: int | None = None
    seed: int = 0
    base_model_name_or_path: str | None = None
    base_model: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    peft_type: str = "QPEFT"

    def __post_init__(self) -> None:
        for name, what in (("filters", "names"), ("yes_words", "words"), ("no_words", "words")):
            if (given := names_of(getattr(self, name))) is None:
                raise TypeError(f"QPeftConfig: {name} must be {what}, got {shorten(getattr(self, name))}")
            setattr(self, name, given)
        self._take_template()
        check_values(vars(self))
        if self.score != "likelihood" and not self.is_set("loss"):
            self.loss = "listwise"
        if self.target_modules is not None:
            names = names_of(self.target_modules)
            if not names or not all(isinstance(name, str) and name for name in names):
                given = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
                raise ValueError(f"QPeftConfig: target_modules must be names of layers, got {shorten(given)}")
            self.target_modules = names
        if self.compat == "official":
            self._take_official_values()
        for excluded, message in CHECKS:
            if excluded(self):
                raise ValueError(f"QPeftConfig: {message.format(c=self)}")

    def is_set(self, name: str) -> bool:
        """Return True if an option differs from its default, or from the value that compat="official" gives it.

        Args:
            name: Name of the option.
        """
        is_given = self.compat == "official" and name in OFFICIAL
        return getattr(self, name) != (OFFICIAL[name] if is_given else _default(name))

    def _take_template(self) -> None:
        """Fill in what the template decides. Raises: ValueError for a value that it does not have."""
        if not isinstance(self.template, str) or not isinstance(self.instruction, str):
            return  # `check_values` says so
        self.template = template_text(self.template)
        self.instruction, decided = decided_by_template(self.template, self.instruction, self.score)
        self._take(decided, "this template")

    def _take_official_values(self) -> None:
        """Raises: ValueError for an option that the official code does not have."""
        if self.instruction == DEFAULT_INSTRUCTION:
            self.instruction = OFFICIAL_INSTRUCTION
        self._take(OFFICIAL, "compat='official'")
        at_least("max_document_tokens of compat='official', which counts its template,", self.max_document_tokens, 5)

    def _take(self, values: Mapping[str, Any], owner: str) -> None:
        """Take the values of options in which something leaves no choice. Raises: ValueError for another value."""
        for name, value in values.items():
            if (got := getattr(self, name)) not in (_default(name), value):
                raise ValueError(
                    f"QPeftConfig: {owner} has {name}={value!r} and nothing else, got {got!r}; leave {name} out"
                )
            setattr(self, name, value)

    @classmethod
    def recommended(cls, examples: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> QPeftConfig:
        """Return the options that ranked best in our experiments; `qpeft train` uses them.

        They are the clues of Q-PEFT-R, a LoRA of rank 16 for all linear layers that the query generates, the listwise
        loss, and seven hard negatives per query. The LoRA is left out where it would learn nothing from documents:
        with clues="none", loss="pointwise" or compat="official". A teacher's loss has no in-batch negatives.

        Args:
            examples: Training examples, if they are known already. Where each has at least seven negatives, of which
                seven are used, the documents of other queries are no negatives: they improved nothing there, and a
                step took 2.3 times as long.
            options: Options of `QPeftConfig` that replace the recommended ones.

        Returns:
            The config.

        Raises:
            TypeError: For an option that does not exist, or a value of another type.
            ValueError: As `QPeftConfig`.

        Example:
            >>> from qpeft_ext import QPeftConfig
            >>> config = QPeftConfig.recommended(k=5)
            >>> config.clues, config.k, config.loss, config.generated_lora_rank, config.target_modules
            ('top_k', 5, 'listwise', 16, ('all-linear',))
        """
        return cls(**recommended_options(examples, options))

    def resolve(self, width: int) -> QPeftConfig:
        """Return the config for an LM, in which "auto" is replaced by a number.

        Args:
            width: Width D of the LM's embeddings.

        Raises:
            ValueError: For a rank above ``width``, or a number of heads that does not divide it.
        """
        rank = min(256, width) if isinstance(self.rank, str) else self.rank
        if rank is not None and rank > width:
            raise ValueError(
                f"QPeftConfig: rank must be at most the embedding width {width}, got {rank}; use rank=None"
            )
        if self.clues == "attention" and width % self.num_heads:
            fitting = [h for h in range(1, min(width, 64) + 1) if width % h == 0]
            raise ValueError(
                f"QPeftConfig: num_heads must divide the embedding width {width}, got {self.num_heads}; "
                f"possible: {', '.join(map(str, fitting))}"
            )
        return dataclasses.replace(self, rank=rank)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as values of JSON, by their names."""
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QPeftConfig:
        """Return a config with these options.

        Args:
            values: Options by their names; the others keep their defaults.

        Raises:
            TypeError: For a value of another type.
            ValueError: For an unknown option, and as `QPeftConfig`.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"QPeftConfig: unknown option {shorten(name)}{did_you_mean(name, known)}")
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> QPeftConfig:
        """Read ``adapter_config.json`` of an adapter.

        Args:
            folder: Folder of the adapter.

        Raises:
            FileNotFoundError: If the folder has no such file.
            ValueError: If the file describes no Q-PEFT adapter; the message names file and option.
        """
        path = Path(folder) / "adapter_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a Q-PEFT adapter: it has no adapter_config.json")
        try:
            values = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; save the adapter again") from None
        if not isinstance(values, dict) or values.get("peft_type") != "QPEFT":
            kind = values.get("peft_type") if isinstance(values, dict) else None
            raise ValueError(f"{path}: expected a Q-PEFT adapter (peft_type QPEFT), got peft_type {shorten(kind)}")
        values = {name: value for name, value in values.items() if name not in ("qpeft_version", "versions")}
        # as all were trained before there was a choice
        values = {"allow_special_tokens": True, "special_tokens": "bos"} | values
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(QPeftConfig) if field.name == name)
