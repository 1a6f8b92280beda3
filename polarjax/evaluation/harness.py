"""A model directory as a model of lm-evaluation-harness, dense or sparse; importing this registers it as `polarjax`.

Needs the package lm-eval 0.4.13 or newer: `pip install 'polarjax[eval]'`. That release looks for no entry points; newer
ones may find the one in the group `lm_eval.models`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import jax

from polarjax.checkpoint.bundle import Bundle, needed_tokenizer
from polarjax.checkpoint.loading import load
from polarjax.errors import InputError
from polarjax.evaluation.checks import Mode, check_mode
from polarjax.evaluation.continuation_checks import window_length
from polarjax.evaluation.continuations import Pair, Score, score_continuations
from polarjax.evaluation.harness_checks import (
    batch_rows,
    check_device,
    check_finished,
    check_texts,
    encoded,
    lm_eval_module,
    special_token,
)
from polarjax.evaluation.harness_generation import generation_options
from polarjax.generation.checks import folded, random_key
from polarjax.numeric import check_type, whole_number
from polarjax.selection.plans import densities
from polarjax.selection.selectors import Sparsity
from polarjax.text.continuation import ContinueOptions, continue_batches
from polarjax.types import DTypeLike

GENERATED_ROWS = 16  # sequences that are generated together if the batch size is not given
_Template: Any = lm_eval_module("lm_eval.api.model").TemplateLM


class HarnessLM(_Template):
    """A polarjax model that lm-evaluation-harness can evaluate.

    Texts become tokens as with lm-eval's own `hf` backend. Log-likelihoods come from `forward`, with sparsity as a mask
    and neurons chosen for each token; texts are generated as by `Bundle.complete`, with sparsity used in decoding and
    neurons chosen for the batch.

    Args:
      pretrained: a model directory, or a `Bundle`.
      sparsity: "auto" uses the routers and plans, if the model has both; None is the dense model; or a `Sparsity`.
      head_density: fraction of heads (groups) to keep, only with "auto"; None is the calibrated default.
      mode: of log-likelihoods. "masked" is sparse at every token of context and continuation; "decode" only after the
        context, which generation reads densely too.
      batch_size: sequences that run together; "auto" takes as many as their length allows for log-likelihoods, and
        `GENERATED_ROWS` for generation.
      max_batch_size: ignored; lm-eval passes it for other backends.
      device: None, or the name of the platform that JAX uses, which this cannot change.
      dtype: the parameters' dtype; None keeps the stored one. Only with a directory.
      max_length: most tokens that the model reads at once; None is its number of positions.
      max_gen_toks: most tokens to generate for requests that don't say.
      add_bos_token: whether texts begin with the tokenizer's BOS token; None leaves it to the tokenizer.
      prefix_token_id: the token before a text without context; None is BOS, or EOS if there is no BOS.
      seed: of generations that draw.
      chat_template_args: further arguments of the chat template.

    Raises:
      CheckpointError: the directory is missing or damaged, or has no tokenizer.
      InputError: an option is not usable.
      SparsityError: routers or plans are needed and missing, or are for another model.
    """

    def __init__(
        self,
        pretrained: Bundle | str | os.PathLike[str],
        *,
        sparsity: Sparsity | Literal["auto"] | None = "auto",
        head_density: float | None = None,
        mode: Mode = "masked",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        chat_template_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size
        check_device(device)
        check_mode(mode, where="HarnessLM")
        self.mode: Mode = mode
        self._rows = batch_rows(batch_size)
        if isinstance(pretrained, Bundle) and dtype is not None:
            hint = "load the bundle with that dtype"
            raise InputError("dtype needs a model directory", where="HarnessLM", got=dtype, hint=hint)
        self.bundle = pretrained if isinstance(pretrained, Bundle) else load(pretrained, dtype=dtype)
        where = "HarnessLM" if isinstance(pretrained, Bundle) else pretrained
        self._tokenizer = needed_tokenizer(self.bundle, where)
        self.tokenizer = self._tokenizer.hf
        self._skip = self.bundle.sparsity_by_batch(sparsity, head_density)
        self._max_length = window_length(max_length, self.bundle.model.config)
        self._max_gen_toks = whole_number(max_gen_toks, "max_gen_toks", where="HarnessLM")
        self.add_bos_token = add_bos_token
        self._prefix = special_token(prefix_token_id, self.bundle.model.config.vocab_size)
        self._key = random_key(seed)
        hint = "pass a mapping of names to values, or leave it out"
        given = {} if chat_template_args is None else chat_template_args
        self._chat_template_args = dict(check_type(given, Mapping, where="chat_template_args", hint=hint))

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        ids = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((each for each in ids if each is not None), None)
        if found is None:
            hint = "pass prefix_token_id"
            raise InputError("the tokenizer has neither BOS nor EOS token", where="HarnessLM", hint=hint)
        return found

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Most tokens to generate for requests that don't say."""
        return self._max_gen_toks

    @property
    def batch_size(self) -> int | str:
        """Sequences that run together."""
        return self._rows or "auto"

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes the tokenizers of cached requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval records about the model."""
        model, sparsity = self.bundle.model, self._skip(1)
        return {
            "polarjax": version("polarjax"),
            "model_num_parameters": sum(each.size for each in jax.tree.leaves(model)),
            "model_dtype": str(model.dtype),
            "density": None if sparsity is None else densities(sparsity.plan, model.config),
            "protocol": None if sparsity is None else self.mode,
        }

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Token ids, the last `left_truncate_len` of them; a text that begins with the prefix token gets no other."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        ids = encoded(self.tokenizer, string, special)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding writes it) for each request."""
        check_texts([each.args[1] for each in requests])
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm  # progress is shown in our own way
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for i, score in self._scores(pairs):
            scores[i] = (score.log_likelihood, score.greedy)
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
        return scores

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        return score_continuations(
            self.bundle.model,
            pairs,
            sparsity=self._skip(1),
            mode=self.mode,
            batch_size=self._rows,
            max_length=self.max_length,
            description="log-likelihoods",
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in nats: cut into windows, each token scored once."""
        del disable_tqdm
        utils = lm_eval_module("lm_eval.utils")
        windows = [
            (i, utils.make_disjoint_window(each))
            for i, request in enumerate(requests)
            for each in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        for i, score in self._scores([window for _, window in windows]):
            totals[windows[i][0]] += score.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to the first of its stop strings."""
        del disable_tqdm
        normalized = lm_eval_module("lm_eval.models.utils").normalize_gen_kwargs
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=repr), []).append(i)
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        room = self.max_length
        options = [
            generation_options(
                normalized(dict(requests[indices[0]].args[1]), self.max_gen_toks),
                self.bundle.generation,
                eos=eos,
                room=room,
            )
            for indices in groups.values()
        ]  # all of them first, so that bad ones are refused before anything is generated
        texts = [""] * len(requests)
        for n, (indices, each) in enumerate(zip(groups.values(), options, strict=True)):
            contexts = [requests[i].args[0] for i in indices]
            for at, text in self._generate(contexts, each, folded(self._key, n)):
                texts[indices[at]] = text
                self.cache_hook.add_partial("generate_until", requests[indices[at]].args, text)
        return texts

    def _generate(
        self, contexts: Sequence[str], options: ContinueOptions, key: Any
    ) -> Iterator[tuple[int, str]]:
        """(index, text) of each context, the longest contexts first."""
        most = self.max_length - options.max_new_tokens
        bos = self.tokenizer.bos_token
        special = lambda text: False if bos and text.startswith(bos) else None  # no second BOS
        encode = lambda text: self.tok_encode(text, special(text), left_truncate_len=most)
        rows = [encode(each) or [self.prefix_token_id] for each in contexts]
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), rows[i]))
        batches = continue_batches(
            self.bundle.model,
            self._tokenizer,
            [rows[i] for i in order],
            key,
            dataclasses.replace(options, batch_size=self._rows or GENERATED_ROWS),
            skip=self._skip,
        )
        for i, completion in zip(order, (each for batch in batches for each in batch), strict=True):
            check_finished(completion, where=f"the text after {contexts[i]!r:.40}")
            yield i, completion.text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, up to where the model answers, or its last message left open."""
        arguments = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self._chat_template_args,
        }
        return self._tokenizer.chat_text(chat_history, **arguments)


def _register() -> None:
    """Adds `polarjax` to lm-eval's table of models, unless an entry point has."""
    lm_eval_module("lm_eval.models")  # lm-eval loads its own models only into an empty table
    table = lm_eval_module("lm_eval.api.registry").model_registry
    if "polarjax" not in table:
        table.register("polarjax")(HarnessLM)


_register()
