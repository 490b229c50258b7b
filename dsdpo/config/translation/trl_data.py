"""The data sets that TRL's scripts and the recipes of the alignment handbook name, as names of ours.

A set of a hub is `org/name:split`, or `org/name:subset:split`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsdpo.config.translation.rules import (
    NOT_SET,
    Given,
    Meaning,
    NoEffect,
    Refused,
    Rule,
    Sets,
    each,
    is_off,
    lossless_list,
    no_effect,
    number,
    only,
    option,
    refused,
    word,
)

_NO_NAME = (None, "", "none", "null")  # `no` may be one: Norwegian
_READ_AS = "what a column means is told by its name, or by columns in an entry of dataset_info.json"


def set_name(name: str, subset: Any = None, split: Any = None, share: float = 1.0) -> str:
    """A set of a hub by our name; files, and names with a split of their own, stay as they are."""
    split = None if split in _NO_NAME else str(split)
    subset = None if subset in (*_NO_NAME, "default") else str(subset)
    if share < 1.0:
        split = f"{split or 'train'}[:{round(100 * share)}%]"
    if subset:
        return f"{name}:{subset}:{split or 'train'}"
    return f"{name}:{split}" if split not in (None, "train") else name


def _evaluates(given: Given) -> bool:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy"))
    return word(strategy) in ("steps", "epoch") if strategy is not None else not is_off(given.get("do_eval"))


def _dataset_name(value: Any, given: Given) -> Meaning:
    if value is None or value == "":
        return NoEffect(NOT_SET)
    subset = given.get("dataset_config", given.get("dataset_config_name"))
    found: dict[str, Any] = {"dataset": [set_name(str(value), subset, given.get("dataset_train_split"))]}
    if _evaluates(given) and "/" in str(value):
        found["eval_dataset"] = [set_name(str(value), subset, given.get("dataset_test_split") or "test")]
    return Sets(found)


def _mixture(value: Any, given: Given) -> Meaning:
    """`datasets` of TRL, and `dataset_mixture` of the handbook: a list of sets with split, subset and weight."""
    block = value if isinstance(value, dict) else {"datasets": value, "test_split_size": given.get("test_split_size")}
    sets = _sets(block)
    if not sets:
        return NoEffect(NOT_SET)
    names = []
    for one in sets:
        one = {"path": one} if isinstance(one, str) else one
        name = one.get("id", one.get("path")) if isinstance(one, dict) else None
        if not name:
            return Refused("each set needs its hub id, under path (TRL) or id (the handbook)")
        if one.get("data_files") or one.get("data_dir"):
            return Refused("a set of files stands in dataset_info.json: name it in dataset")
        share = 1.0 if one.get("weight") is None else number(one["weight"])
        if share is None or not 0 < share <= 1:
            return Refused(f"weight is {one.get('weight')}; allowed: the share of the set to take, above 0 and up to 1")
        names.append(set_name(str(name), one.get("config", one.get("name")), one.get("split"), share))
    found: dict[str, Any] = {"dataset": names}
    if not is_off(block.get("test_split_size")):
        found["val_size"] = block["test_split_size"]
    return Sets(found)


def _sets(block: Mapping[str, Any]) -> list[Any]:
    """Of a mixture; one name alone may be no list."""
    found = block.get("datasets") or []
    return found if isinstance(found, list) else lossless_list(found)


def shares(block: Mapping[str, Any]) -> list[float]:
    """Of each set of a mixture that names one."""
    weights = [number(one.get("weight")) for one in _sets(block) if isinstance(one, dict)]
    return [weight for weight in weights if weight is not None]


def _mixer(value: Any, given: Given) -> Meaning:
    """`dataset_mixer` of the handbook's earlier recipes: set -> share, with `dataset_splits` for all."""
    if not isinstance(value, dict) or not value:
        return NoEffect(NOT_SET) if is_off(value) else Refused("give lines of `org/name: share`")
    splits = lossless_list(given.get("dataset_splits") or ["train", "test"])
    train = [split for split in splits if "train" in split]
    test = [split for split in splits if "test" in split]
    if len(train) + len(test) < len(splits):
        return Refused("name train and test splits alone in dataset_splits, or write dataset: org/name:split")
    shares = {name: number(share) for name, share in value.items()}
    if any(share is None or not 0 < share <= 1 for share in shares.values()):
        return Refused("each share must be above 0 and at most 1")
    subset = given.get("dataset_configs")
    if subset and not isinstance(subset, list):
        subset = [subset]
    subsets = dict(zip(shares, subset)) if subset else {}
    names = [
        set_name(name, subsets.get(name), split, float(share or 1)) for name, share in shares.items() for split in train
    ]
    found: dict[str, Any] = {"dataset": names}
    if _evaluates(given) and test:
        found["eval_dataset"] = [set_name(name, subsets.get(name), split) for name in shares for split in test]
    return Sets(found)


def _tokenizing(value: Any, given: Given) -> Meaning:
    """Settings of TRL's own tokenizing, which the chat template decides here."""
    if is_off(value) or (isinstance(value, dict) and set(value) <= {"add_special_tokens", "append_concat_token"}):
        return NoEffect("the chat template writes special tokens")
    return Refused("the data is prepared as docs/formats.md says; delete the line")


DATA: dict[str, Rule] = {
    "dataset_name": _dataset_name,
    "datasets": _mixture,
    "dataset_mixture": _mixture,
    "dataset_mixer": _mixer,
    **each(no_effect("see dataset_name"), "dataset_config dataset_config_name dataset_train_split dataset_test_split"),
    **each(no_effect("see dataset_mixer"), "dataset_splits dataset_configs"),
    "test_split_size": no_effect("see datasets"),
    "dataset_num_proc": option("preprocessing_num_workers"),
    "dataset_batch_size": no_effect("it is about speed alone"),
    "shuffle_dataset": no_effect("seed orders the data anew in every epoch"),
    **each(no_effect("prepared data is read in pieces"), "dataset_streaming streaming buffer_size"),
    "dataset_text_field": only("text", why="texts are read from text", remedy=_READ_AS),
    "text_column": only("text", why="texts are read from text", remedy=_READ_AS),
    "dataset_kwargs": _tokenizing,
    "auto_insert_empty_system_msg": refused("set default_system, or nothing: the template decides"),
}
