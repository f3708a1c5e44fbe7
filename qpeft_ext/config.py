"""`QPeftConfig`: every option of the method, in one dataclass, stored as ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .utils.small_files import read_json
from .utils.text import shorten
from .utils.words import did_you_mean

CLUES = ("attention", "top_k", "none")
FILTERS = ("query_tokens", "stop_words", "non_alphabetic")
SIMILARITIES = ("cosine", "dot")
SELECTIONS = ("similarity", "random")
SOURCES = ("document", "candidates", "vocabulary", "vocabulary_per_token")
CLUE_EMBEDDINGS = ("frozen", "low_rank", "full")
SOFT_PROMPT_INITS = ("text", "random")
LOSSES = ("pointwise_pairwise", "pointwise", "pairwise", "listwise", "contrastive", "margin_mse")
LAYOUTS = ("document_first", "clues_first")
COMPAT = ("none", "official")
OFFICIAL_INSTRUCTION = "given the hints, please generate a question for the input passage"
# what compat="official" has no choice in: an option that is left at its default takes this value
OFFICIAL = {
    "rank": None,
    "residual": False,
    "clue_embeddings": "full",
    "attention_bias": True,
    "source": "document",
    "selection": "similarity",
    "score_gate": False,
    "generated_lora_rank": None,
    "num_virtual_tokens": None,
    "template": "qpeft",
    "allow_special_tokens": True,
}
_MAX_TEXT = 1 << 16
TEMPLATES = ("qpeft", "upr")
DEFAULT_INSTRUCTION = "Please write a question for the passage."


@dataclass
class QPeftConfig:
    """Options of Q-PEFT (arXiv 2404.04522), its prompt and its training groups.

    Without arguments Q-PEFT-A and the objective of the paper. What ranked best in our experiments, and what
    `qpeft train` does: ``clues="top_k", generated_lora_rank=16, target_modules="all-linear", loss="listwise"``.

    Args:
        clues: "attention" (Q-PEFT-A), "top_k" (Q-PEFT-R) or "none" (UPR: nothing is trained).
        k: clues per pair for "top_k"; a document with fewer distinct tokens gives fewer clues.
        num_heads: attention heads for "attention"; divides the embedding width D.
        rank: inner width of the clue MLP and of the low-rank projections; "auto" is min(256, D), None means
            full matrices.
        residual: whether the clue MLP has a residual path, so that training starts at the clue tokens themselves;
            without it (for comparison) it starts at random vectors.
        attention_bias: whether the four projections of "attention" have biases.
        dropout: on the output of the clue attention, in training.
        filters: document tokens that never become clues, or are not attended to: any of "query_tokens", "stop_words",
            "non_alphabetic".
        source: where the clues of "top_k" come from: the pair's "document" (the paper); the query's concatenated
            "candidates", one list of clues per query (a score then depends on the list: `Reranker.rank`, not
            `predict`; in training the example's own documents); the whole "vocabulary", one list per query; or
            "vocabulary_per_token", the k neighbours of each query token other than itself.
        similarity: "cosine" or "dot", for "top_k".
        selection: "similarity", or "random" (by a hash of `seed`, query and document; the paper's ablation).
        clue_embeddings: what the tokens of "top_k" are re-embedded with: "frozen" (the LM's table E), "low_rank"
            (E + A·B of `rank`, trained) or "full" (a trained copy of E: 131 M parameters for Llama-2-7B).
        score_gate: trains the choice of "top_k" as well: a low-rank projection of the query's embeddings, whose scores
            weigh the clue vectors. Training then chooses 2k clues, scoring k.
        generated_lora_rank: rank of a low-rank update of the LM that the query generates, in force on the query suffix
            only (`GeneratedLora`); None for none. It combines with every kind of clues.
        target_modules: which linear layers it updates, endings of their names as in `peft`, or "all-linear"; None:
            q_proj and v_proj, or what the LM has in their place.
        layout: "document_first", or "clues_first" for comparison: clues before the passage, so that no prefix can be
            shared between queries and every pair is read whole. A generated LoRA is then in force behind the passage.
        compat: "official" composes prompt, clues and score as the official code does, faults included (`official` says
            which), for Llama's tokenizer only; "none" does not.
        template: "qpeft", or "upr": UPR's prompt, ``Passage: {title} {text}. Please write a question based on this
            passage.``, and UPR's score, to which of an encoder–decoder LM everything belongs that its tokenizer makes
            of the query, ``</s>`` too. Clues stand before the full stop.
        instruction: text at the start of every prompt of the template "qpeft".
        num_virtual_tokens: P of a soft prompt, trained virtual tokens that stand in every prompt where the instruction
            would; None for none. It combines with every kind of clues; with "none" it is prompt tuning.
        soft_prompt_init: what they are at the start: "text" (the tokens of the instruction, repeated or cut to P) or
            "random" (tokens of the vocabulary, drawn with `seed`).
        soft_prompt_mlp: inner width of an MLP that re-parameterises them, the identity at the start; None for none.
        train_lm: full fine-tuning, for comparison: every weight of the LM is trained along and saved (as large as the
            LM itself). Needs clues="none"; load the LM in float32.
        allow_special_tokens: whether the words of a special token (``</s>``, ``<|im_start|>``) in a document or a query
            become that token; without it they are text. An adapter that was saved before this option keeps True.
        max_document_tokens: a longer document (title and text) is cut at its end.
        max_query_tokens: a longer query is an error.
        queries_per_group: queries that share their documents as in-batch negatives.
        num_hard_negatives: negatives of its own that each query brings to a training step.
        num_random_negatives: documents of other examples, drawn at random, that each query brings besides.
        in_batch_negatives: whether the documents of the group's other queries are negatives too.
        loss: "pointwise_pairwise" (the paper), "pointwise", "pairwise", "listwise", "contrastive" (in both directions,
            within a group) or "margin_mse" (distillation; examples carry teacher scores).
        margin: of the pairwise loss, in nats per query token.
        temperature: nats per query token that count as one in "listwise", "contrastive" and "margin_mse"; "auto": what
            suits the LM before training (`temperature`), found by `QPeftTrainer` and then written here.
        suffix_micro_batch: pairs whose suffix activations are held at once in training (the rest is recomputed in
            the backward pass); None holds all of them.
        base_model_name_or_path, base_model: the LM that the adapter belongs to; filled in by `get_qpeft_model`.

    Raises: ValueError for an unknown or impossible value.
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
    train_lm: bool = False
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
    peft_type: str = "QPEFT"

    def __post_init__(self) -> None:
        names = (self.filters,) if isinstance(self.filters, str) else self.filters
        if not isinstance(names, (tuple, list, set, frozenset)):
            raise TypeError(f"QPeftConfig: filters must be names, got {shorten(names)}")
        self.filters = tuple(names)
        _one_of("clues", self.clues, CLUES)
        _one_of("source", self.source, SOURCES)
        _one_of("clue_embeddings", self.clue_embeddings, CLUE_EMBEDDINGS)
        for name in ("score_gate", "attention_bias", "residual", "train_lm", "allow_special_tokens"):
            _boolean(name, getattr(self, name))
        _one_of("similarity", self.similarity, SIMILARITIES)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("loss", self.loss, LOSSES)
        _one_of("soft_prompt_init", self.soft_prompt_init, SOFT_PROMPT_INITS)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("compat", self.compat, COMPAT)
        _one_of("template", self.template, TEMPLATES)
        for name in self.filters:
            _one_of("filters", name, FILTERS)
        for name in ("k", "num_heads", "max_document_tokens", "max_query_tokens", "queries_per_group"):
            _at_least(name, getattr(self, name), 1)
        for name in ("num_hard_negatives", "num_random_negatives"):
            _at_least(name, getattr(self, name), 0)
        _at_least("seed", self.seed, 0, 2**63 - 1)
        _boolean("in_batch_negatives", self.in_batch_negatives)
        for name in ("instruction", "base_model_name_or_path", "peft_type"):
            _text(name, getattr(self, name), optional=name == "base_model_name_or_path")
        for name in ("dropout", "margin"):
            _number(name, getattr(self, name))
        if self.base_model is not None:
            _expect_description(self.base_model)
        for name in ("suffix_micro_batch", "generated_lora_rank", "num_virtual_tokens", "soft_prompt_mlp"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.rank is not None and self.rank != "auto":
            _at_least("rank", self.rank, 1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"QPeftConfig: dropout must be in [0, 1), got {self.dropout!r}")
        if self.temperature != "auto":
            _number("temperature", self.temperature, "'auto' or a number above 0")
            if self.temperature <= 0:
                raise ValueError(f"QPeftConfig: temperature must be 'auto' or above 0, got {self.temperature!r}")
        if self.target_modules is not None:
            names = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
            if (
                not isinstance(names, (tuple, list, set, frozenset))
                or not names
                or not all(isinstance(name, str) and name for name in names)
            ):
                raise ValueError(f"QPeftConfig: target_modules must be names of layers, got {shorten(names)}")
            self.target_modules = tuple(names)
        if self.compat == "official":
            self._take_official_values()
        self._expect_compatible()

    def _take_official_values(self) -> None:
        """Raises: ValueError for an option that the official code does not have."""
        if self.instruction == DEFAULT_INSTRUCTION:
            self.instruction = OFFICIAL_INSTRUCTION
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in OFFICIAL.items():
            if (got := getattr(self, name)) not in (defaults[name], value):
                raise ValueError(
                    f"QPeftConfig: compat='official' has {name}={value!r} and nothing else, got {got!r}; "
                    f"leave {name} out"
                )
            setattr(self, name, value)
        _at_least("max_document_tokens of compat='official', which counts its template,", self.max_document_tokens, 5)

    def _expect_compatible(self) -> None:
        """An option that does nothing beside the others must not be set in vain."""
        table = OFFICIAL["clue_embeddings"] if self.compat == "official" else "frozen"
        for name, default in (
            ("source", "document"),
            ("clue_embeddings", table),
            ("score_gate", False),
            ("similarity", "cosine"),
            ("selection", "similarity"),
        ):
            if self.clues != "top_k" and getattr(self, name) != default:
                raise ValueError(
                    f"QPeftConfig: {name}={getattr(self, name)!r} needs clues='top_k', got clues={self.clues!r}"
                )
        if self.clues == "none" and not self.residual and self.compat == "none":
            raise ValueError("QPeftConfig: residual=False is of the clue MLP, but clues='none' has none; leave it out")
        for name, default in (("soft_prompt_init", "text"), ("soft_prompt_mlp", None)):
            if self.num_virtual_tokens is None and getattr(self, name) != default:
                raise ValueError(
                    f"QPeftConfig: {name}={getattr(self, name)!r} is of a soft prompt; set num_virtual_tokens"
                )
        if self.layout == "clues_first" and self.clues == "none":
            raise ValueError(
                "QPeftConfig: layout='clues_first' says where the clues go, but clues='none' has none; leave layout out"
            )
        if self.layout == "clues_first" and self.num_virtual_tokens is not None:
            raise ValueError(
                "QPeftConfig: layout='clues_first' has its instruction as text; leave num_virtual_tokens out"
            )
        if self.template == "upr" and self.instruction != DEFAULT_INSTRUCTION:
            raise ValueError(
                "QPeftConfig: template='upr' has an instruction of its own; leave instruction out, or set "
                "template='qpeft'"
            )
        for name, value in (("num_virtual_tokens", None), ("layout", "document_first")):
            if self.template == "upr" and getattr(self, name) != value:
                raise ValueError(
                    f"QPeftConfig: template='upr' has its instruction behind the passage; leave {name} out"
                )
        if self.train_lm and (self.clues != "none" or self.generated_lora_rank is not None):
            raise ValueError(
                "QPeftConfig: train_lm=True needs clues='none' and no generated LoRA: both read an "
                "embedding table and weights that are frozen"
            )
        if self.target_modules is not None and self.generated_lora_rank is None:
            raise ValueError("QPeftConfig: target_modules are those of the generated LoRA; set generated_lora_rank")
        if self.generated_lora_rank is not None and self.loss == "pointwise":
            raise ValueError(
                "QPeftConfig: loss='pointwise' alone would teach the generated LoRA the query itself, "
                "whatever the document; use pointwise_pairwise or another loss with negatives"
            )
        if self.loss == "contrastive" and not (self.in_batch_negatives and self.queries_per_group > 1):
            raise ValueError(
                "QPeftConfig: loss='contrastive' compares the queries and documents of a group; set "
                "in_batch_negatives=True and queries_per_group to 2 or more"
            )
        if self.loss == "margin_mse" and (self.in_batch_negatives or self.num_random_negatives):
            raise ValueError(
                "QPeftConfig: loss='margin_mse' learns from teacher scores, which documents of other "
                "examples do not have; set in_batch_negatives=False and num_random_negatives=0"
            )
        if self.selection == "random":
            if self.source.startswith("vocabulary"):
                raise ValueError(
                    f"QPeftConfig: selection='random' needs source='document' or 'candidates', got source="
                    f"{self.source!r}: random tokens of the vocabulary say nothing about any text"
                )
            if self.score_gate:
                raise ValueError(
                    "QPeftConfig: selection='random' has no scores that score_gate=True could train; "
                    "set one of them only"
                )

    def resolve(self, width: int) -> QPeftConfig:
        """The config for an LM whose embeddings are ``width`` wide: "auto" replaced, sizes checked."""
        rank = min(256, width) if self.rank == "auto" else self.rank
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
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QPeftConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"QPeftConfig: unknown option {shorten(name)}{did_you_mean(name, known)}")
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> QPeftConfig:
        """Read ``adapter_config.json`` of an adapter folder."""
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
        values = {"allow_special_tokens": True} | values  # as all were trained before there was a choice
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of `QPeftConfig` from texts NAME=VALUE; a value is JSON, or else a plain text ("a,b" where names go).

    Raises: ValueError for a text without "=" or an unknown name.
    """
    fields, options = {field.name: field for field in dataclasses.fields(QPeftConfig)}, {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
        if name not in fields:
            raise ValueError(f"QPeftConfig: unknown option {name!r}{did_you_mean(name, fields)}")
        try:
            options[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            options[name] = tuple(value.split(",")) if str(fields[name].type).startswith("tuple") else value
    return options


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"QPeftConfig: {name} must be one of {', '.join(allowed)}, got {shorten(value)}"
            f"{did_you_mean(value, allowed)}"
        )


def _at_least(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"QPeftConfig: {name} must be a whole number, got {shorten(value)}")
    if value < least:
        raise ValueError(f"QPeftConfig: {name} must be at least {least}, got {shorten(value)}")
    if value > most:
        raise ValueError(f"QPeftConfig: {name} must be at most {most}, got {shorten(value)}")


def _number(name: str, value: object, what: str = "a number") -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"QPeftConfig: {name} must be {what}, got {shorten(value)}")
    if not -1e300 < value < 1e300:  # nor NaN
        raise ValueError(f"QPeftConfig: {name} must be finite, got {shorten(value)}")


def _text(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str):
        raise TypeError(f"QPeftConfig: {name} must be a text, got {shorten(value)}")
    if len(value) > _MAX_TEXT:
        raise ValueError(f"QPeftConfig: {name} must have at most {_MAX_TEXT} characters, got {len(value)}")


def _expect_description(lm: object) -> None:
    """What an adapter remembers of its LM (`adapter_files.describe_lm`)."""
    if not isinstance(lm, dict) or not isinstance(lm.get("model_type"), str):
        raise ValueError(f"QPeftConfig: base_model must describe an LM, got {shorten(lm)}")
    for name in ("vocab_size", "hidden_size"):
        _at_least(f"{name} of base_model", lm.get(name), 1)
    probe = lm.get("embedding_probe")
    if not isinstance(probe, list) or not all(type(x) in (int, float) and abs(x) < 1e38 for x in probe):
        raise ValueError(
            f"QPeftConfig: embedding_probe of base_model must be a list of finite numbers, got {shorten(probe)}"
        )


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"QPeftConfig: {name} must be True or False, got {shorten(value)}")
