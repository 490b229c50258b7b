"""What `prepare` makes of records, files and folders: decoded texts, or the codes of what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsdpo.config.schema import RunConfig
from dsdpo.data.prepare import prepare, summary
from dsdpo.data.shards import DROPPED_ROWS
from dsdpo.data.templates import load_tokenizer
from dsdpo.errors import ConfigError, DsdpoError

Content = Sequence[Any] | bytes | Callable[[Path], object]


@dataclass(frozen=True)
class Read:
    """What came out.

    Attributes:
        exit_code: 0, or that of the error.
        dropped: code of a reason -> records.
        texts: [prompt, completion, completion, ...] of each example, decoded with special tokens.
        learned: the same of the tokens in the loss alone, for each completion.
        notes: text -> records, as the summary counts them.
        said: the summary, or the error's message.
        codes: of the problems of a ConfigError.
    """

    exit_code: int
    dropped: Mapping[str, int]
    texts: list[list[str]] = field(default_factory=list)
    learned: list[list[str]] = field(default_factory=list)
    notes: Mapping[str, int] = field(default_factory=dict)
    said: str = ""
    codes: list[str] = field(default_factory=list)


def read(
    folder: Path,
    model: Path,
    content: Content,
    name: str = "rows.jsonl",
    entry: dict[str, Any] | None = None,
    **options: Any,
) -> Read:
    """Prepare one set.

    Args:
        folder: an empty folder to work in.
        model: a folder with a tokenizer.
        content: records (written as JSON lines), the bytes of the file, or a function that writes the given path.
        name: of the file or folder in dataset_dir; the set itself is called so where there is no entry.
        entry: of dataset_info.json, without file_name.
        options: of the run config.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    path = data / name
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    if entry is not None:
        (data / "dataset_info.json").write_text(json.dumps({"described": {"file_name": name, **entry}}))
    settings = {"max_length": 2048, "max_refused": 0.0, **options}
    config = RunConfig(
        model_name_or_path=str(model),
        dataset=["described" if entry is not None else name],
        dataset_dir=str(data),
        output_dir=str(folder / "out"),
        **settings,
    )
    try:
        prepared = prepare(config, "train")
    except DsdpoError as error:
        codes = [problem.code for problem in error.problems] if isinstance(error, ConfigError) else []
        return Read(error.exit_code, _dropped(config.cache_path, "*.dropped_rows.jsonl"), said=str(error), codes=codes)
    assert prepared is not None
    tokenizer = load_tokenizer(str(model))
    examples = [prepared.example(i) for i in range(len(prepared))]
    texts = [[tokenizer.decode(ids) for ids in (example.prompt_ids, *example.completion_ids)] for example in examples]
    dropped = _dropped(config.cache_path, f"*/{DROPPED_ROWS}")
    learned = [
        [tokenizer.decode(ids[example.is_scored(n)]) for n, ids in enumerate(example.completion_ids)]
        for example in examples
    ]
    return Read(0, dropped, texts, learned, prepared.manifest["notes"], summary(prepared))


def _dropped(cache: Path, pattern: str) -> Mapping[str, int]:
    lines = [line for path in (cache / "prepared").glob(pattern) for line in path.read_text().splitlines()]
    return Counter(json.loads(line)["code"] for line in lines)
