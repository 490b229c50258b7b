"""Messages and lists that a column holds as text: JSON is read, Python's repr is refused, other text stays text."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from dsdpo.data.named_templates import NAMED
from tests.helpers.field import read
from tests.unit.data.conftest import make_tokenizer

ASK = [{"role": "user", "content": "What's up?"}]
YES = [{"role": "assistant", "content": "The sun."}]
NO = [{"role": "assistant", "content": "Nothing."}]
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
PROMPT = "<|im_start|>user\nWhat's up?<|im_end|>\n<|im_start|>assistant\n"
TEXTS = [[PROMPT, "The sun.<|im_end|>", "Nothing.<|im_end|>"]]
BOM = "\ufeff"
DICTS = [{"from": "human", "value": "What's up?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer("chatml", NAMED["chatml"].jinja).save_pretrained(folder)
    return folder


def text(value):
    return json.dumps(value)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"prompt": text(ASK), "chosen": text(YES), "rejected": text(NO)}, id="all"),
        pytest.param({"prompt": "What's up?", "chosen": text(ASK + YES), "rejected": text(ASK + NO)}, id="whole"),
        pytest.param({"chosen": text(ASK + YES), "rejected": text(ASK + NO)}, id="implicit"),
        pytest.param({"prompt": ASK, "chosen": text(YES[0]), "rejected": text(NO[0])}, id="one-object"),
        pytest.param(
            {"prompt": " " + text(ASK) + "\n", "chosen": "The sun.", "rejected": "Nothing."}, id="prompt-alone"
        ),
        pytest.param({"conversations": text(DICTS), "chosen": "The sun.", "rejected": "Nothing."}, id="sharegpt"),
        pytest.param(
            {
                "conversations": text(DICTS),
                "chosen": text({"from": "gpt", "value": "The sun."}),
                "rejected": text({"from": "gpt", "value": "Nothing."}),
            },
            id="sharegpt-sides",
        ),
        pytest.param({"instruction": "What's up?", "output": text(["The sun.", "Nothing."])}, id="output-list"),
        pytest.param({"prompt": text(text(ASK)), "chosen": text(text(YES)), "rejected": text(text(NO))}, id="twice"),
        pytest.param({"conversations": text(text(DICTS)), "chosen": "The sun.", "rejected": "Nothing."}, id="dicts-2"),
        pytest.param(
            {"messages": text([*ASK, {"role": "assistant", "chosen_value": "The sun.", "rejected_value": "Nothing."}])},
            id="cvalues",
        ),
        pytest.param({"prompt": BOM + text(ASK), "chosen": BOM + text(YES), "rejected": BOM + text(NO)}, id="marks"),
        pytest.param(
            {"prompt": "What's up?", "chosen": f"\n{BOM}{text(YES)}", "rejected": text(BOM + text(NO))}, id="mark"
        ),
        pytest.param(
            {"conversations": BOM + text(DICTS), "chosen": "The sun.", "rejected": "Nothing."}, id="mark-dicts"
        ),
        pytest.param({"instruction": "What's up?", "output": BOM + text(["The sun.", "Nothing."])}, id="mark-output"),
        pytest.param(
            {
                "prompt": text([ASK[0] | {"name": math.nan}]),
                "chosen": text(YES),
                "rejected": text([NO[0] | {"tool_calls": math.nan}]),
            },
            id="nan",
        ),
        pytest.param(
            {"conversations": text([DICTS[0] | {"weight": math.nan}]), "chosen": "The sun.", "rejected": "Nothing."},
            id="nan-dicts",
        ),
    ],
)
def test_json_text_is_read(tmp_path, model, record):
    result = read(tmp_path / "lines", model, [record])
    assert (result.exit_code, result.texts) == (0, TEXTS), result.said
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(record))
    writer.writeheader()
    writer.writerow({key: value if isinstance(value, str) else text(value) for key, value in record.items()})
    as_csv = read(tmp_path / "csv", model, stream.getvalue().encode(), name="rows.csv")
    assert (as_csv.exit_code, as_csv.texts) == (0, TEXTS), as_csv.said


def test_history_as_json_text(tmp_path, model):
    record = {"instruction": "And?", "history": text([["What's up?", "The sun."]]), "output": ["Much.", "Nothing."]}
    [[prompt, *_]] = read(tmp_path, model, [record]).texts
    assert prompt == f"{PROMPT}The sun.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"


NUMPY = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': \"It's up.\"}]"


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"prompt": "Hi", "chosen": str(ASK + YES), "rejected": str(ASK + NO)}, id="repr"),
        pytest.param({"prompt": "Hi", "chosen": NUMPY, "rejected": NUMPY.replace("up", "low")}, id="numpy"),
        pytest.param({"prompt": "Hi", "chosen": f"array({NUMPY}, dtype=object)", "rejected": "No."}, id="array"),
        pytest.param({"prompt": str(ASK), "chosen": "Yes.", "rejected": "No."}, id="prompt"),
        pytest.param({"conversations": str(DICTS), "chosen": "Yes.", "rejected": "No."}, id="sharegpt"),
        pytest.param({"instruction": "Hi", "output": str(["Yes.", "No."])}, id="output"),
        pytest.param({"prompt": "Hi", "chosen": BOM + str(ASK + YES), "rejected": str(ASK + NO)}, id="mark"),
        pytest.param({"instruction": "Hi", "history": str([["a", "b"]]), "output": ["Yes.", "No."]}, id="history"),
        pytest.param({"prompt": ASK, "chosen": YES, "rejected": NO, "tools": str([TOOL])}, id="tools"),
        pytest.param(
            {"prompt": ASK, "chosen": YES, "rejected": NO, "chat_template_kwargs": "{'a': True}"}, id="kwargs"
        ),
    ],
)
def test_python_repr_is_refused(tmp_path, model, record):
    result = read(tmp_path, model, [record])
    assert (result.exit_code, result.dropped) == (65, {"python_repr": 1}), result.said


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param('[{"role": "assistant", "content": "Yes."},]', id="comma"),
        pytest.param('[{"role": "assistant", "content": "Yes."}, {"ro', id="cut"),
        pytest.param('[{"role": "assistant", "content": "Yes."}', id="cut-after-an-object"),
        pytest.param('[{"content": "She said "yes"", "role": "assistant"}]', id="quotes"),
        pytest.param('{"role": "assistant", "content": "Yes.", "train": True}', id="python-true"),
        pytest.param(text(ASK[0]) + "\n" + text(YES[0]), id="lines"),
    ],
)
def test_damaged_json_of_messages_is_refused(tmp_path, model, chosen):
    result = read(tmp_path, model, [{"prompt": "What's up?", "chosen": chosen, "rejected": "No."}])
    assert (result.exit_code, result.dropped) == (65, {"messages_not_json": 1}), result.said


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": '[{"role": "assistant", "content": "Yes.", "content": "Yea."}]', "rejected": "No."},
        {"instruction": "Hi", "output": ["Yes.", "No."], "history": '[{"role": "user", "role": "system"}]'},
        {"prompt": ASK, "chosen": YES, "rejected": NO, "tools": '[{"name": "tide", "name": "wind"}]'},
    ],
)
def test_json_text_with_a_key_that_stands_twice_is_refused(tmp_path, model, record):
    result = read(tmp_path, model, [record])
    assert (result.exit_code, result.dropped) == (65, {"key_twice": 1}), result.said


def test_line_ends_inside_json_text_are_read(tmp_path, model):
    chosen = '[{"role": "assistant", "content": "The\nsun."}]'
    result = read(tmp_path, model, [{"prompt": "What's up?", "chosen": chosen, "rejected": "Nothing."}])
    assert result.texts == [[PROMPT, "The\nsun.<|im_end|>", "Nothing.<|im_end|>"]]


@pytest.mark.parametrize(
    "chosen",
    [
        "[1] Smith, 2020.",
        "[{",
        "[]",
        '["a", "b"]',
        '[{"city": "Rome"}]',
        '{"answer": 4}',
        '{"from": "USD", "value": 3}',
        '"[1] Smith, 2020."',
        '"{}"',
        "{'answer': 4}",
        "['a', 'b'] is a list.",
        '[{"role": "user"}]',
        "[{'role': 'user', 'content': 'Hi'}] is how messages look.",
        '[{"role": "user", "content": "Hi"}] is how messages look.',
        '[{"role": "user", "content": "Hi"}, 3]',
        "[x for x in 'role']",
        f"{BOM}[1] Smith, 2020.",
        '{"city": "Rome", "city": "Oslo"}',
        '[{"city": NaN}]',
    ],
)
def test_other_text_stays_text(tmp_path, model, chosen):
    result = read(tmp_path, model, [{"prompt": "How does it look?", "chosen": chosen, "rejected": "Odd."}])
    assert result.texts == [["How does it look?", f"{chosen}<|im_end|>", "Odd.<|im_end|>"]], result.said
