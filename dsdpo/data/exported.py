"""What a trained folder needs so that it is asked and stops as the run trained it: chat template and end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.data.template_files import template_place
from dsdpo.data.templates import ExampleEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExportedTemplate:
    """Of a run.

    Attributes:
        chat_template: with which `apply_chat_template` gives the ids that were trained; None: there is none.
        end_token: ends the completions that were trained.
        call_ends: tokens that end replies with calls, or beside tools, where the template writes others.
        pad_token: for a reward model, whose reward transformers takes from the last token that is no padding; so it
            must not end completions. None: the tokenizer's own.
    """

    chat_template: str | dict[str, str] | None
    end_token: str
    call_ends: Sequence[str] = ()
    pad_token: str | None = None

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, config: RunConfig, end_token: str | None, date: str | None
    ) -> ExportedTemplate:
        """What a run trains with.

        Args:
            tokenizer: of the model.
            end_token: that its prepared set ends completions with; None: not known, the template's.
            date: as the template writes it, or None.

        Raises:
            ConfigError: the template does not fit the tokenizer.
        """
        template = template_place(config.template, config.model_source.hub)
        encoder = ExampleEncoder(tokenizer, template, config.default_system, date)
        end = end_token or str(tokenizer.convert_ids_to_tokens(encoder.end_id))
        pad = _padding(tokenizer, [end, *encoder.end_tokens]) if STAGES[config.stage].head == "value" else None
        return cls(encoder.chat_template or tokenizer.chat_template, end, encoder.end_tokens[1:], pad)

    def put_into(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give a tokenizer the chat template and the end token, where that changes nothing that the template writes."""
        tokenizer.chat_template = self.chat_template
        if tokenizer.eos_token != self.end_token and "eos_token" not in str(self.chat_template):
            tokenizer.eos_token = self.end_token
        if self.pad_token is not None:
            tokenizer.pad_token = self.pad_token

    def end_ids(self, tokenizer: PreTrainedTokenizerBase, own: Any) -> int | list[int]:
        """Token ids at which generation stops.

        Args:
            tokenizer: of the model.
            own: the model's own end tokens: an id, a list, or None.
        """
        ids = own if isinstance(own, list) else [own]
        ends = map(tokenizer.convert_tokens_to_ids, (self.end_token, *self.call_ends))
        found = list(dict.fromkeys(int(id_) for id_ in (*ends, *ids) if isinstance(id_, int)))
        return found if len(found) > 1 else found[0]


def _padding(tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]) -> str | None:
    """A token that ends no completion: the tokenizer's own, else a special one. BOS stands at the beginning alone."""
    own = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
    return next((str(token) for token in own if token is not None and str(token) not in ends), None)
