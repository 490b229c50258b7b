"""What a prepared set was made from, as one hash: tokenizer, settings, entries and the content of their files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdpo.config.schema import RunConfig
from dsdpo.data.encode import Limits
from dsdpo.data.hub_sets import NotCached, load_hub, modelscope_digest
from dsdpo.data.registry import DatasetEntry
from dsdpo.data.template_date import date_uses
from dsdpo.errors import DataError
from dsdpo.runtime.files import file_digest, file_state, is_settled, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise it when the same inputs would give other examples, and add the last one to `earlier_fingerprints`. How shards
# are written is shards.SHARD_FORMAT.
CODE_VERSION = 6

# What turns a tokenizer's files into a tokenizer.
_TOKENIZER_PACKAGES = ("transformers", "tokenizers", "sentencepiece", "tiktoken")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, chat template, special tokens. Its path does not matter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return _digest(
        {
            "content": content,
            "chat_template": tokenizer.chat_template,
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        }
    )


@dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a tokenizer without loading it.

    Attributes:
        digest: `tokenizer_digest`.
        date_uses: of its chat template, as `template_date.date_uses` gives them.
    """

    digest: str
    date_uses: list[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
        """Read from a tokenizer."""
        return cls(tokenizer_digest(tokenizer), date_uses(tokenizer.chat_template))


def known_tokenizer(folder: Path, load: Callable[[], PreTrainedTokenizerBase], stamps: Path) -> TokenizerFacts:
    """`TokenizerFacts` of a model folder's tokenizer, remembered for the same files in the same state.

    Loading a tokenizer takes seconds of imports, which a start with prepared data can do without.

    Args:
        folder: of the model; anything else, such as a hub id, is loaded each time.
        load: the tokenizer, called if its digest is not known.
        stamps: folder that remembers digests.
    """
    state = _tokenizer_state(folder)
    if state is None:
        return TokenizerFacts.of(load())
    stamp = stamps / f"tokenizer-{_digest(str(folder.absolute()))}.json"
    if stamp.exists():
        known = json.loads(stamp.read_bytes())
        if known.get("state") == state:
            return TokenizerFacts(known["digest"], known["date_uses"])
    facts = TokenizerFacts.of(load())
    if all(map(is_settled, state["files"])):
        write_atomically(stamp, json.dumps({"state": state, **asdict(facts)}))
    return facts


def _tokenizer_state(folder: Path) -> dict[str, Any] | None:
    """The state of all files that a tokenizer may be read from, and versions. None where it is not known."""
    if not folder.is_dir():
        return None
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("*_chat_templates/*")) if path.is_file())
    return {
        "files": [file_state(path) for path in files],
        "versions": {name: _version(name) for name in _TOKENIZER_PACKAGES},
        "code": CODE_VERSION,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def set_fingerprint(
    config: RunConfig,
    entries: list[DatasetEntry],
    tokenizer: str,
    sources: list[str],
    template: str | dict[str, str] | None,
    date: str | None,
    version: int = CODE_VERSION,
) -> str:
    """What a prepared set holds, as one hash.

    Args:
        config: the run; only what changes token ids or refusals counts.
        entries: the sets in order.
        tokenizer: digest of the tokenizer.
        sources: digest of each entry's content.
        template: text of the chat template, or of several by name; None: the tokenizer's own, or none.
        date: the day that the template writes, or None.
        version: CODE_VERSION of the preparation, 4 or later.
    """
    described = []
    for entry, source in zip(entries, sources):
        fields = {key: value for key, value in asdict(entry).items() if key not in ("root", "files")}
        for key, default in (("ignore_columns", ()), ("records", "pairs"), ("revision", None)):
            if fields[key] == default:
                del fields[key]  # sets of earlier versions, which did not have it, are known again
        described.append({**fields, "labels": [entry.label(file) for file in entry.files], "content": source})
    return _digest(
        {
            "version": version,
            "tokenizer": tokenizer,
            "template": config.template if template is None else {"text": template},
            "date": date,
            "default_system": config.default_system,
            "max_samples": config.max_samples,
            "limits": asdict(Limits.of(config)),
            "entries": described,
            **{option: True for option in ("mask_history", "mask_thinking") if getattr(config, option)},
        }
    )


def earlier_fingerprints(
    config: RunConfig,
    entries: list[DatasetEntry],
    tokenizer: str,
    sources: list[str],
    template: str | dict[str, str] | None,
    date: str | None,
) -> dict[int, str]:
    """CODE_VERSION -> what `set_fingerprint` gave the same inputs then. Those sets are made anew; their runs continue.

    A version is left out where it cannot have held the same examples.
    """
    inputs = (config, entries, tokenizer, sources, template, date)
    found = {version: set_fingerprint(*inputs, version=version) for version in (4, 5)}
    if (third := _third_fingerprint(config, entries, tokenizer, sources, date)) is not None:
        found[3] = third
    return found


# What the fingerprint of version 3 was made of.
_EARLIER_TEMPLATES = ("default", "llama2", "llama3", "chatml", "qwen", "none", "gpt2")
_EARLIER_LIMITS = ("max_length", "truncation_mode", "row_tokens", "share_prefix")
_EARLIER_FIELDS = ("name", "hub_id", "subset", "split", "folder", "modelscope") + (
    ("formatting", "columns", "tags", "num_samples", "allow_empty_rejected")
)


def _third_fingerprint(
    config: RunConfig, entries: list[DatasetEntry], tokenizer: str, sources: list[str], date: str | None
) -> str | None:
    """The fingerprint of version 3, or None.

    A date is known to be the same only where template_date says it: version 3 took the day of preparation.
    """
    if config.template not in _EARLIER_TEMPLATES or (date is not None and not config.template_date):
        return None
    limits, described = asdict(Limits.of(config)), []
    for entry, source in zip(entries, sources):
        fields = asdict(entry)
        kept = {key: fields[key] for key in _EARLIER_FIELDS}
        described.append({**kept, "labels": [entry.label(file) for file in entry.files], "content": source})
    return _digest(
        {
            "version": 3,
            "tokenizer": tokenizer,
            "template": config.template,
            "default_system": config.default_system,
            "max_samples": config.max_samples,
            "limits": {key: limits[key] for key in _EARLIER_LIMITS},
            "entries": described,
        }
    )


def source_digest(entry: DatasetEntry, stamps: Path, refresh: bool) -> str:
    """Hash of an entry's content.

    Args:
        entry: files or a hub set.
        stamps: folder that remembers hashes, so that a file is read once and not by every rank.
        refresh: ask the hub again; otherwise what it gave last time counts, as it does where HF_HUB_OFFLINE is set and
            the set is not in the cache of `datasets`.

    Raises:
        DataError: a hub set that has not been loaded yet, when `refresh` is False, or that cannot be read.
        ConfigError: the hub has no such set, or refuses it.
        IOFailure: the hub gave no answer.
    """
    if entry.hub_id is None:
        return _digest([file_digest(path, stamps) for path in entry.files])
    identity = {"hub": entry.hub_id, "subset": entry.subset, "split": entry.split, "folder": entry.folder}
    identity |= {"revision": entry.revision} if entry.revision else {}
    stamp = stamps / f"{_digest({**identity, 'modelscope': entry.modelscope})}.json"
    if refresh:
        try:
            found = modelscope_digest(entry, stamps) if entry.modelscope else load_hub(entry)._fingerprint
            write_atomically(stamp, json.dumps({**identity, "fingerprint": found}))
        except NotCached:
            if not stamp.exists():
                raise
    elif not stamp.exists():
        raise DataError(f"{entry.hub_id} has not been loaded from the hub yet; run `dsdpo prepare` first")
    return str(json.loads(stamp.read_bytes())["fingerprint"])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
