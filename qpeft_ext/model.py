"""`QPeftModel`: a frozen LM, a trained clue module, and the likelihood of queries given documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batch import ClueInputs, PairBatch, Rows, assemble_rows, to_device
from .cache import DocumentCache
from .clues import Clues, build_clues
from .config import QPeftConfig
from .engine import Engine
from .generated_lora import GeneratedLora
from .prefix_cache import PrefixKV
from .prompt import Document, Prompt
from .schedule import READ_TOKENS_PER_TOKEN, default_tokens, prefix_groups, suffix_groups, tokens_worth_a_pass
from .suffix_pass import log_likelihood

CLUE_BYTES = 32 << 20  # clue vectors held at once without gradient; those of more pairs are computed pass by pass


@dataclass
class Scores:
    """Scores of B pairs.

    query_log_likelihood: Σ log p(query token), nats, float32 [B]; larger is better.  num_tokens: query tokens [B].
    """

    query_log_likelihood: Tensor
    num_tokens: Tensor

    @property
    def mean_query_log_likelihood(self) -> Tensor:
        """The sum ÷ the number of query tokens, [B]: ranks as the sum does, comparable between queries."""
        return self.query_log_likelihood / self.num_tokens


class QPeftModel(nn.Module):
    """Composes an LM (any causal LM of transformers, or a `peft` model) with a clue module; patches neither.

    The LM is frozen (unless ``train_lm``), stays in eval mode and in its dtype; the clue module has float32 weights.
    Build it with `get_qpeft_model` or load it with `QPeftModel.from_pretrained`.

    Args:
        lm: the language model.  config: `QPeftConfig`.  tokenizer: the LM's tokenizer.
    """

    def __init__(self, lm: nn.Module, config: QPeftConfig, tokenizer) -> None:
        super().__init__()
        lm.eval()
        if config.train_lm and hasattr(lm, "peft_config"):
            raise ValueError("QPeftModel: train_lm=True trains the whole LM; give it without its peft adapter")
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in getattr(lm, "peft_config", {}).values()):
            raise ValueError("QPeftModel: a peft adapter of virtual tokens (prompt tuning, prefix tuning) would not be "
                             "read; give the LM without it")
        if not hasattr(lm, "peft_config"):
            lm.requires_grad_(config.train_lm)
        self.lm = lm
        self.tokenizer = tokenizer
        self.engine = Engine(lm)
        self.qpeft_config = config = config.resolve(self.engine.table.shape[1])
        self.prompt = Prompt(tokenizer, config)
        with torch.random.fork_rng(devices=[]):  # the same seed, the same clue module, whatever was drawn before
            torch.default_generator.manual_seed(config.seed)
            self.clues = build_clues(config, self.engine.table, tokenizer)
            self.generated_lora = None
            if config.generated_lora_rank:
                width = self.engine.table.shape[1]
                self.generated_lora = GeneratedLora(lm, width, config.generated_lora_rank, config.target_modules)
        self.to_device_of_lm()
        self.eval()

    def to_device_of_lm(self) -> None:
        """Move the trained modules to the device of the LM's embeddings."""
        for module in self.trained_modules.values():
            module.to(self.engine.device)

    @property
    def trained_modules(self) -> dict[str, nn.Module]:
        """What an adapter consists of, by the prefix of its keys in the adapter file."""
        parts = {"": self.clues, "generated_lora.": self.generated_lora}
        return {prefix: module for prefix, module in parts.items() if module is not None}

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def train(self, mode: bool = True) -> QPeftModel:
        """Train mode for the clue module and for dropout *inside* adapters of the LM; never for the LM itself.

        Only of adapters that are trained: the dropout of others would end up in cached prefixes.
        """
        super().train(mode)
        self.lm.eval()
        for module in self.lm.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(mode and any(p.requires_grad for p in module.parameters()))
        return self

    # -- scoring -------------------------------------------------------------------------------------------------

    def encode(self, pairs: Sequence[tuple[str, Document]], lists: Sequence[int] | None = None) -> PairBatch:
        """Tokenise pairs (query, document). ``lists``: see `PairBatch.from_text`."""
        return PairBatch.from_text(self.prompt, pairs, lists)

    def forward(
        self,
        batch: PairBatch,
        path: str = "document_first",
        cache: DocumentCache | None = None,
        max_tokens_per_batch: int | None = None,
        deterministic: bool = False,
        prefilled: bool = False,
    ) -> Scores:
        """Score B pairs.

        Args:
            batch: from `encode`.
            path: "document_first" (each distinct document's prefix once, then the suffixes), or "plain" (whole
                prompts). Models whose cache cannot be shared take the plain path either way.
            cache: prefixes are read from it and put into it, where the LM is not trained.
            max_tokens_per_batch: budget of tokens per pass; None: what suits the device (`schedule.default_tokens`).
            deterministic: every prefix, clue and suffix is computed alone and unpadded, so that a score is bit-equal
                whatever else is in the batch or in the cache (same machine, same number of threads). Slower.
            prefilled: the prefixes are in the cache already (`fill`): documents of different lengths may share a pass.
        """
        if path not in ("document_first", "plain"):
            raise ValueError(f"path must be document_first or plain, got {path!r}")
        if not len(batch):
            empty = torch.zeros(0, device=self.device)
            return Scores(empty, empty.long())
        shared = path == "document_first" and not self.engine.why_plain
        max_tokens = max_tokens_per_batch or default_tokens(self.device)
        pass_tokens = tokens_worth_a_pass(self.device)
        max_pairs = 1 if deterministic else (self.qpeft_config.suffix_micro_batch if torch.is_grad_enabled() else None)
        rows, parts = [], []
        of_list = self.qpeft_config.source != "document"  # dear for a pair by itself
        at_once = torch.is_grad_enabled() or of_list or self._clue_bytes(batch) <= CLUE_BYTES
        at_once = at_once and not deterministic
        clues = self.compute_clues(batch) if at_once else None
        counts = _counts(clues, len(batch))
        prefix_padding = pass_tokens * (READ_TOKENS_PER_TOKEN if prefilled else 1)
        for documents in prefix_groups(batch, 1 if deterministic else max_tokens, prefix_padding):
            prefix = None
            if shared:
                ids = [batch.documents[d].ids for d in documents]
                prefix = self.engine.cached_prefill(ids, cache, one_by_one=deterministic)
            per_token = self.qpeft_config.clues == "attention"
            for group in suffix_groups(batch, documents, max_tokens, max_pairs, pass_tokens, shared, per_token):
                part = batch.select(group)
                if at_once:
                    own, own_counts = clues and clues[group], [counts[i] for i in group]
                else:
                    own = self.compute_clues(part, alone=deterministic)
                    own_counts = _counts(own, len(part))
                rows += group
                parts.append(self._score_group(part, own, own_counts, documents, prefix))
        total = torch.cat(parts)
        order = torch.empty(len(rows), dtype=torch.long)
        order[torch.tensor(rows)] = torch.arange(len(rows))
        num_tokens = to_device(np.array([len(batch.queries[q]) for q, _ in batch.pairs]), total.device)
        return Scores(total[order.to(total.device)], num_tokens)

    @torch.no_grad()
    def fill(self, batch: PairBatch, cache: DocumentCache, max_tokens_per_batch: int, deterministic: bool) -> bool:
        """Put the prefixes of a batch into the cache, if its memory holds all of them. Returns: whether it does."""
        if self.engine.why_plain or self.engine.prefix_bytes(batch.documents) > cache.max_bytes:
            return False
        for documents in prefix_groups(batch, max_tokens_per_batch, tokens_worth_a_pass(self.device)):
            self.engine.cached_prefill([batch.documents[d].ids for d in documents], cache, one_by_one=deterministic)
        return True

    def compute_clues(self, batch: PairBatch, explain: bool = False, alone: bool = False) -> Clues | None:
        """Clues of every pair of the batch; None for ``clues="none"``. ``alone``: reuse nothing of other calls."""
        if self.clues is None:
            return None
        inputs = ClueInputs.from_batch(batch, self.device, self.qpeft_config.source)
        return self.clues(inputs, self.engine.table, self.engine.scale, explain, alone)

    def _clue_bytes(self, batch: PairBatch) -> int:
        """Of the clue vectors of all pairs, padded."""
        config = self.qpeft_config
        of_each = {"attention": max(map(len, batch.queries)), "top_k": config.k, "none": 0}[config.clues]
        return 4 * len(batch) * of_each * self.engine.table.shape[1]

    def _score_group(
        self,
        batch: PairBatch,
        clues: Clues | None,
        counts: Sequence[int],
        documents: list[int],
        prefix: PrefixKV | None,
    ) -> Tensor:
        """Σ log p(query token) of the pairs of one suffix pass, [B]; ``counts``: clues of each."""
        vectors = None if clues is None else clues.embeds[clues.mask]
        rows = self._rows(batch, counts, with_prefix=prefix is None)
        prefix_rows = None
        if prefix is not None:
            place = {d: i for i, d in enumerate(documents)}
            order = [place[d] for _, d in batch.pairs]
            if order != list(range(len(prefix.lengths))):
                prefix_rows = to_device(np.array(order), self.device)
        run, arguments = log_likelihood, (self.engine, rows, vectors, prefix, prefix_rows)
        if self.generated_lora is not None:
            run, arguments = self._with_generated_lora, (batch, *arguments)
        if self.qpeft_config.suffix_micro_batch and torch.is_grad_enabled():
            log_p = checkpoint(run, *arguments, use_reentrant=False)
        else:
            log_p = run(*arguments)
        return rows.sum_of_each_pair(log_p)

    def _rows(self, batch: PairBatch, counts: Sequence[int], with_prefix: bool) -> Rows:
        """What the LM reads of each pair, and what it is asked for."""
        return assemble_rows(batch, self.prompt.suffix, counts, self.device, with_prefix)

    def _with_generated_lora(self, batch: PairBatch, engine: Engine, rows, vectors, prefix, prefix_rows) -> Tensor:
        """`log_likelihood` with the update that each pair's query generates, on the suffixes only."""
        suffix = None
        if prefix is None:
            lengths = to_device(np.array([len(batch.documents[d].ids) for _, d in batch.pairs]), self.device)
            suffix = torch.arange(rows.ids.shape[1], device=self.device) >= lengths[:, None]
        with self.generated_lora.active(self.generated_lora.gates_of_pairs(batch, engine.table), suffix):
            return log_likelihood(engine, rows, vectors, prefix, prefix_rows)

    def merge_for(self, query: str) -> dict[str, Tensor]:
        """Weights of the LM's suffix passes for one query, by parameter name; prefixes keep the LM's own.

        Raises: ValueError without a generated LoRA.
        """
        if self.generated_lora is None:
            raise ValueError("merge_for: the model has no generated LoRA; set generated_lora_rank in QPeftConfig")
        return self.generated_lora.merged(self.prompt.queries([query])[0], self.engine.table)

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, Document]], **options) -> Scores:
        """Scores of (query, document) pairs, without gradient; ``options`` as in `forward`."""
        return self(self.encode(pairs), **options)

    # -- parameters and files ------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters, and all parameters of LM and clue module."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def save_pretrained(self, folder) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card; see `adapter_files`."""
        from .adapter_files import save_adapter

        save_adapter(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Save to a temporary folder and upload it; ``kwargs`` go to `huggingface_hub.HfApi.create_repo`."""
        from .adapter_files import push_adapter

        return push_adapter(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, folder, lm=None, tokenizer=None, is_trainable: bool = False, **lm_kwargs) -> QPeftModel:
        """Load an adapter; the LM named in its config is loaded unless ``lm`` (a model or a name) is given."""
        from .adapter_files import load_adapter

        return load_adapter(cls, folder, lm, tokenizer, is_trainable, **lm_kwargs)


def get_qpeft_model(lm, config: QPeftConfig, tokenizer=None) -> QPeftModel:
    """Wrap a causal LM, or a `peft` model of one, for Q-PEFT.

    Args:
        lm: the model; its own parameters are frozen, or trained with ``train_lm`` (an adapter's stay as they are).
        config: `QPeftConfig`.
        tokenizer: loaded from ``lm.name_or_path`` if None.
    """
    from .adapter_files import describe_lm
    from .loading import load_tokenizer

    name = getattr(lm, "name_or_path", None) or getattr(lm.config, "_name_or_path", None) or None
    if tokenizer is None:
        if not name:
            raise ValueError("get_qpeft_model: tokenizer must be given, because the LM has no name_or_path")
        tokenizer = load_tokenizer(name)
    config = replace(config, base_model_name_or_path=config.base_model_name_or_path or name)
    model = QPeftModel(lm, config, tokenizer)
    model.qpeft_config = replace(model.qpeft_config, base_model=describe_lm(model.engine))
    return model


def _counts(clues: Clues | None, pairs: int) -> list[int]:
    """Clues of each pair. Asked once for many passes: on a GPU it waits for all that was begun before."""
    return [0] * pairs if clues is None else clues.mask.sum(1).tolist()
