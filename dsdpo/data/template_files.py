"""Where the text of a run's chat template comes from. Nothing heavy is imported, but for a model id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.config.hubs import Hub, ModelSource
from dsdpo.config.schema import RunConfig
from dsdpo.config.templates import OWN, PLAIN, is_path, is_text
from dsdpo.data.named_templates import NAMED
from dsdpo.errors import ConfigError, Problem

DEFAULT, TOOL_USE = "default", "tool_use"  # names that apply_chat_template takes by itself
Text = str | dict[str, str]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OF_PROCESSOR = "chat_template.json"


@dataclass(frozen=True)
class TemplateText:
    """What `template` of a run config names.

    Attributes:
        text: of the template, or of several by name; None: the tokenizer's own, or none at all.
        is_named: it is one of ours, which knows roles and contents alone.
        is_plain: no template: prompt and completion as they stand.
    """

    text: Text | None
    is_named: bool = False
    is_plain: bool = False


def find_template(template: str) -> TemplateText:
    """The text behind a template's name, path or model id.

    Raises:
        ConfigError: there is no such file, or no chat template in the file, folder or model.
    """
    if template == OWN:
        return TemplateText(None)
    if template in PLAIN:
        return TemplateText(None, is_plain=True)
    if template in NAMED:
        return TemplateText(NAMED[template].jinja, is_named=True)
    if is_text(template):
        return TemplateText(template)
    assert is_path(template), "the run config has been checked"
    return TemplateText(_checked(template, _found(template)))


def is_hub_id(template: str) -> bool:
    """Whether it is the id of a model on a hub, whose chat template is taken."""
    return _HUB_ID.fullmatch(template) is not None and not Path(template).exists()


def template_place(template: str, hub: Hub) -> str:
    """A template as it is named, or the folder that stands for an id of ModelScope.

    Raises:
        ConfigError, IOFailure: as `ModelSource.local`.
    """
    if hub != "modelscope" or not is_hub_id(template):
        return template
    return str(ModelSource(template, hub).local("template", whole=False))


def problems(config: RunConfig, faulty: frozenset[str]) -> list[Problem]:
    """What is wrong with the file or folder that `template` names; a model id is not looked up.

    Args:
        faulty: options whose values cannot be used.
    """
    template = config.template
    if "template" in faulty or is_text(template) or is_hub_id(template):
        return []
    try:
        find_template(template)
    except ConfigError as error:
        return error.problems
    return []


def _found(template: str) -> Any:
    """What a file, folder or model holds in place of a template."""
    path = Path(template)
    try:
        if path.is_dir():
            return _of_folder(path)
        if path.is_file():
            return _of_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        text = f"template: the template in {template} cannot be read: {error}; give the path of a .jinja file in UTF-8"
        raise ConfigError(Problem("template-unreadable", "template", text)) from error
    if _HUB_ID.fullmatch(template):
        return _of_model(template)
    text = f"template: there is no file or folder {template}; give the path of a .jinja file, or a model folder"
    raise ConfigError(Problem("template-missing", "template", text))


def _checked(template: str, found: Any) -> Text:
    """One template, or several by name with a default among them. Raises ConfigError."""
    if isinstance(found, list):
        found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        found = {name: text for name, text in found.items() if isinstance(text, str) and text}
        if found and DEFAULT not in found:
            names = ", ".join(sorted(found))
            text = (
                f"template: {template} has the chat templates {names} and none that is called {DEFAULT}; give the path "
            )
            text += "of the one that you mean as a .jinja file"
            raise ConfigError(Problem("template-none", "template", text))
        found = found[DEFAULT] if len(found) == 1 else found
    if not found or not isinstance(found, (str, dict)):
        text = f"template: {template} has no chat template; name another one, or a .jinja file"
        raise ConfigError(Problem("template-none", "template", text))
    return found


def _of_folder(folder: Path) -> Any:
    """As transformers reads them: files of their own come before the settings; a processor's file comes last."""
    file, settings, processor = folder / "chat_template.jinja", folder / "tokenizer_config.json", folder / _OF_PROCESSOR
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if file.is_file():
        files = {DEFAULT: file, **files}
    if files:
        return {name: path.read_text(encoding="utf-8-sig") for name, path in files.items()}
    found = _of_json(settings) if settings.is_file() else None
    return found or (_of_json(processor) if processor.is_file() else None)


def _of_json(path: Path) -> Any:
    read = json.loads(path.read_text(encoding="utf-8-sig"))
    return read.get("chat_template") if isinstance(read, dict) else None


def _of_model(model: str) -> Any:
    """Of a hub id."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    try:
        found = AutoTokenizer.from_pretrained(model).chat_template
        if not found:
            path = cached_file(model, _OF_PROCESSOR, _raise_exceptions_for_missing_entries=False)
            found = _of_json(Path(path)) if path else None
        return found
    except (OSError, ValueError) as error:
        text = f"template: {model} is no file or folder, and no tokenizer of a model of that id can be loaded: {error}"
        raise ConfigError(Problem("template-model", "template", text)) from error


def template_beside(model: str) -> str:
    """The file of a processor's chat template in a model folder; empty where there is none."""
    path = Path(model, _OF_PROCESSOR)
    return str(path) if path.is_file() else ""
