"""Options of a run as a user of another trainer has written them, put into ours; files may mix names.

Whose options they are is told by names that only one trainer has. Its defaults then count for what nothing sets, unless
there is also an option that only this trainer has. What a file is, no option on the command line changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsdpo.config.fields import resume_policy
from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGE_ALIASES, STAGES
from dsdpo.config.translation import llama_factory, trl
from dsdpo.config.translation.common import COMMON
from dsdpo.config.translation.rules import Given, Meaning, NoEffect, Refused, Rule, Sets, number
from dsdpo.config.translation.trainer import OWN, PER_DEVICE, SHARED, TRAINER
from dsdpo.config.translation.unread import unread
from dsdpo.errors import Problem

PER_DEVICE_SIZE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
BATCH = (PER_DEVICE_SIZE, "per_gpu_train_batch_size", ACCUMULATION)
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Source:
    """Another trainer: its name in messages, its table, and what it takes where nothing says otherwise.

    Attributes:
        signs: names that tell its options from those of the others.
        shared: rules for names that are ours, too.
        own: more of them, where every option is one of this trainer's.
        stage_of: the stage that options are for, where they do not name one; None where they do not tell.
        defaults: of a stage, as options of ours.
        differs: what a run of a stage does otherwise, by its option.
    """

    name: str
    table: Mapping[str, Rule]
    signs: frozenset[str]
    shared: Mapping[str, Rule]
    own: Mapping[str, Rule]
    stage_of: Callable[[Given], str | None]
    defaults: Callable[[str, Given], dict[str, Any]]
    differs: Callable[[str, Given], dict[str, str]]


_LLAMA_FACTORY = Source(
    "LLaMA-Factory",
    {**llama_factory.LLAMA_FACTORY, **TRAINER},
    llama_factory.SIGNS - trl.TRL.keys(),
    SHARED,
    OWN | llama_factory.OWN,
    llama_factory.stage_of,
    llama_factory.defaults,
    llama_factory.differs,
)
_TRL = Source(
    "TRL",
    {**TRAINER, **trl.TRL},
    trl.SIGNS - llama_factory.LLAMA_FACTORY.keys(),
    SHARED | trl.SHARED,
    OWN,
    trl.stage_of,
    trl.defaults,
    trl.differs,
)
_ANY = {**trl.TRL, **llama_factory.LLAMA_FACTORY, **TRAINER}


@dataclass
class Translation:
    """Options in our words, and what became of the others.

    Attributes:
        values, origins: name -> value, and where it was set.
        source: whose options they were; empty where they are ours.
        renamed: their name -> what it set, in words.
        no_effect: their name -> why it has none here.
        defaults: options of ours that the other trainer's defaults have set.
        differs: their name -> what the run does otherwise than the other trainer would.
        batch: examples that a rank takes at a time, and how many times in a step, by their names; empty where
            train_batch_size decides.
        needs_ranks: the size of a step depends on the number of ranks, which was not known.
        problems: what is refused, or set twice.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    source: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    no_effect: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)
    needs_ranks: bool = False
    problems: list[Problem] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to say before a run; empty where nothing was translated."""
        if not self.source:
            return []
        said = [f"read as options of {self.source}; `dsdpo import-config` lists each, and writes a run config"]
        if self.renamed:
            each = [text if name in text else f"{text} ({name})" for name, text in self.renamed.items()]
            said.append(f"  set: {', '.join(each)}")
        if self.defaults:
            found = ", ".join(f"{name} {_text(value)}" for name, value in self.defaults.items())
            said.append(f"  by the defaults of {self.source}: {found}")
        if self.differs:
            said.append(f"  done otherwise: {'; '.join(f'{name}: {text}' for name, text in self.differs.items())}")
        if self.no_effect:
            said.append(f"  no effect here: {', '.join(self.no_effect)}")
        return said


def is_known(name: str) -> bool:
    """Whether another trainer has an option of this name."""
    return name in _ANY or name in BATCH


def translate(
    values: dict[str, Any], origins: dict[str, str], ranks: int | None, recorded: Callable[[], int | None]
) -> Translation:
    """Put a run's options into our words. Nothing changes where all of them are ours, or unknown.

    Args:
        values: option -> value, as given.
        origins: option -> where it was set.
        ranks: how many there will be, on all nodes together; None where that is not known.
        recorded: gives the train_batch_size that the run in output_dir was begun with, if there is one.
    """
    done = Translation(dict(values), dict(origins))
    if not any(is_known(name) for name in values if name not in RunConfig.model_fields):
        return done
    deciding, are_theirs = _deciding(values, origins)
    source, is_mixed = _source_of(deciding)
    done.source = source.name
    given = dict(values)
    takes_defaults = are_theirs and not is_mixed
    if takes_defaults and given.get("stage") is None:
        _take_stage(done, source, given)
    stage = given["stage"] = STAGE_ALIASES.get(str(given.get("stage", "dpo")), str(given.get("stage", "dpo")))
    own = source.defaults(stage, given) if takes_defaults and stage in STAGES else {}
    if own:
        _take_unread(done, source, given, stage, own)
    shared = {**source.shared, **source.own} if takes_defaults else source.shared
    _take_each(done, source.table, shared, given, stage)
    done.differs = source.differs(stage, given)
    if own:
        done.defaults = {name: value for name, value in own.items() if done.values.get(name) is None}
        done.values |= done.defaults
        done.origins |= dict.fromkeys(done.defaults, f"default of {source.name}")
    _take_batch(done, given, origins, takes_defaults, ranks, recorded)
    return done


def _deciding(values: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[set[str], bool]:
    """The options that tell whose all are, and whether all are another trainer's: those of the file, where it has
    some of another trainer; else all but those of ours that do not change what is learned. A file of ours stays ours,
    so that a change on the command line changes that alone."""
    fields = RunConfig.model_fields
    in_file = {name for name in values if origins.get(name) != COMMAND_LINE}
    if any(is_known(name) for name in in_file - fields.keys()):
        return in_file, in_file & fields.keys() <= COMMON
    found = {name for name in values if name in COMMON or name not in fields or resume_policy(fields[name]) != "free"}
    return found, not in_file and found & fields.keys() <= COMMON


def _source_of(names: set[str]) -> tuple[Source, bool]:
    """Whose options they are, and whether they have signs of both."""
    of_trl, of_llama_factory = _TRL.signs & names, _LLAMA_FACTORY.signs & names
    return _TRL if of_trl and not of_llama_factory else _LLAMA_FACTORY, bool(of_trl and of_llama_factory)


def _take_stage(done: Translation, source: Source, given: dict[str, Any]) -> None:
    stage = source.stage_of(given)
    if stage is None:
        text = f"the options are those of {source.name}, and no stage is named; set stage: {', '.join(STAGES)}"
        done.problems.append(Problem("stage-unknown", "stage", text))
        return
    given["stage"] = done.values["stage"] = done.defaults["stage"] = stage
    done.origins["stage"] = f"default of {source.name}"


def _take_unread(done: Translation, source: Source, given: Given, stage: str, own: Mapping[str, Any]) -> None:
    """Take out what other trainers' files hold, and this run does not read: there it is no mistake."""
    is_full = (given.get("finetuning_type") or own.get("finetuning_type")) == "full"
    for name in [name for name in done.values if name not in source.shared]:
        if why := unread(name, done.values[name], given, stage, is_full):
            done.no_effect[name] = why
            del done.values[name], done.origins[name]


def _take_each(
    done: Translation, table: Mapping[str, Rule], shared: Mapping[str, Rule], given: Given, stage: str
) -> None:
    """Replace what has a rule, names that are ours first. The command line wins over a file, whatever the names are."""
    ranked = sorted(
        done.values, key=lambda name: (done.origins.get(name) == COMMAND_LINE, name not in RunConfig.model_fields)
    )
    set_by: dict[str, str] = {name: name for name in done.values if name in RunConfig.model_fields}
    values = dict(done.values)
    for name in ranked:
        is_ours = name in RunConfig.model_fields
        rule = shared.get(name) if is_ours else table.get(name, _ANY.get(name))
        if rule is None or name in BATCH:
            continue
        meaning = _meaning(rule, name, values[name], given, stage)
        place = done.origins.pop(name)
        del done.values[name]
        if is_ours:
            del set_by[name]
        if isinstance(meaning, Refused):
            text = f"{place}: {name} is {_text(values[name])}; {meaning.remedy}"
            done.problems.append(Problem("not-supported", name, text))
        elif isinstance(meaning, NoEffect):
            if not is_ours or values[name] is not None:
                done.no_effect[name] = meaning.why
        else:
            _set(done, name, meaning.options, place, set_by)


def _meaning(rule: Rule, name: str, value: Any, given: Given, stage: str) -> Meaning:
    meaning = rule(value, given)
    if not isinstance(meaning, Sets):
        return meaning
    for option in meaning.options:
        if option not in RunConfig.model_fields:
            return Refused("it is not supported; delete the line")
        own = [spec for spec, found in STAGES.items() if option in found.options]
        if own and stage in STAGES and stage not in own:
            return NoEffect(f"stage {stage} does not read it")
    return meaning


def _set(done: Translation, name: str, options: Mapping[str, Any], place: str, set_by: dict[str, str]) -> None:
    """Set options of ours by one of theirs, unless another name has set them to something else."""
    taken: dict[str, Any] = {}
    for option, value in options.items():
        earlier = set_by.get(option)
        if earlier is not None and earlier != name and _text(done.values[option]) != _text(value):
            other = done.origins[option]
            if (place == COMMAND_LINE) == (other == COMMAND_LINE):
                text = f"{place}: {name} is {_text(value)}, but {earlier} is {_text(done.values[option])} ({other})"
                done.problems.append(Problem("set-twice", option, f"{text}; keep one of them"))
                continue
            if other == COMMAND_LINE:
                done.no_effect[name] = f"{earlier} on the command line wins"
                continue
        done.values[option], done.origins[option], set_by[option] = value, place, name
        taken[option] = value
    if taken.keys() - {name}:
        done.renamed[name] = ", ".join(f"{one} {_text(found)}" for one, found in taken.items())
        done.no_effect.pop(name, None)


def _take_batch(
    done: Translation,
    given: Given,
    origins: Mapping[str, str],
    takes_defaults: bool,
    ranks: int | None,
    recorded: Callable[[], int | None],
) -> None:
    """The size of a step from that of a micro-batch, the number of these, and the number of ranks."""
    names = [name for name in BATCH if name in given]
    for name in names:
        del done.values[name], done.origins[name]
    if not names and not (takes_defaults and "train_batch_size" not in given):
        return
    sizes = [number(given.get(name)) for name in (*BATCH[:2], ACCUMULATION)]
    per_device, older, accumulation = sizes
    factors = {names[0] if names and names[0] != ACCUMULATION else PER_DEVICE_SIZE: per_device or older or PER_DEVICE}
    factors[ACCUMULATION] = accumulation or 1
    for name in names:
        count = number(given[name])
        if given[name] is not None and (count is None or count < 1 or count != int(count)):
            text = f"{origins[name]}: {name} is {_text(given[name])}; allowed: a whole number, at least 1"
            done.problems.append(Problem("value", name, text))
            return
    product = int(factors[ACCUMULATION]) * int(next(iter(factors.values())))
    words = " * ".join(f"{name} {int(count)}" for name, count in factors.items())
    if "train_batch_size" in given:
        _keep_batch(done, given, names, f"{words} * {ranks} ranks", None if ranks is None else product * ranks)
        return
    done.batch = {name: int(count) for name, count in factors.items()}
    begun = recorded()
    done.needs_ranks = begun is None and ranks is None
    size = begun or product * (ranks or 1)
    how = "what the run in output_dir was begun with" if begun else f"{words} * {ranks or 'number of'} ranks"
    done.values["train_batch_size"] = size
    done.origins["train_batch_size"] = origins[names[0]] if names else f"default of {done.source}"
    done.renamed[names[0] if names else PER_DEVICE_SIZE] = f"train_batch_size {size} = {how}"


def _keep_batch(done: Translation, given: Given, names: list[str], words: str, size: int | None) -> None:
    """train_batch_size decides, where the others come to the same; on the command line it wins."""
    wanted, place = given["train_batch_size"], done.origins["train_batch_size"]
    if size is None or number(wanted) == size or place == COMMAND_LINE:
        done.no_effect |= dict.fromkeys(names, "train_batch_size decides")
        return
    text = f"{place}: train_batch_size is {_text(wanted)}, but {words} is {size}; keep one of them"
    done.problems.append(Problem("set-twice", "train_batch_size", text))


def _text(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return "empty" if value is None or value == "" else str(value).lower() if isinstance(value, bool) else str(value)
