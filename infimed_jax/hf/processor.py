"""What turns messages and images into the export's inputs: tokenizer files, chat template, image processor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from infimed_jax.config import Model
from infimed_jax.data.chat import TOKENIZER_FILES
from infimed_jax.errors import UserError
from infimed_jax.files import write_json
from infimed_jax.hf.weights import read_json
from infimed_jax.models.family import family_of

TEMPLATE = "chat_template.jinja"

LIST_CONTENT = """\
{#- Content may be a list of parts, as processors and serving engines send it: an image becomes one mark, which the
    processor expands; text after an image begins on a new line, as in training, unless it does already or is no more
    than the next image's number (<image_2>: ). Strings stay as they are. -#}
{%- set parts = namespace(messages=[], text='', after_image=false) %}
{%- for message in messages %}
    {%- if message.content is string or message.content is not iterable %}
        {%- set parts.messages = parts.messages + [message] %}
    {%- else %}
        {%- set parts.text = '' %}
        {%- set parts.after_image = false %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or part.type == 'image_url' or 'image' in part %}
                {%- set parts.text = parts.text + '<|image_pad|>' %}
                {%- set parts.after_image = true %}
            {%- else %}
                {%- set number = part.text.startswith('<image_') and part.text.endswith('>: ') %}
                {%- if parts.after_image and not number and not part.text.startswith('\\n') %}
                    {%- set parts.text = parts.text + '\\n' %}
                {%- endif %}
                {%- set parts.text = parts.text + part.text %}
                {%- set parts.after_image = false %}
            {%- endif %}
        {%- endfor %}
        {%- set parts.messages = parts.messages + [dict(message, content=parts.text)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = parts.messages %}
"""


def write_processor(tokenizer_folder: str | Path, model: Model, output: Path) -> None:
    """Copy the tokenizer and write chat_template.jinja, preprocessor_config.json and processor_config.json.

    The template is the tokenizer's own with list content allowed; string content renders as before.
    """
    source = Path(tokenizer_folder)
    tokenizer_config = read_json(source / "tokenizer_config.json")
    template = _chat_template(source, tokenizer_config)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    files = family_of(model).hugging_face.processor(model)
    processor = files["processor_config.json"]["processor_class"]
    tokenizer_config.pop("chat_template", None)  # the file says it; two copies could differ
    write_json(output / "tokenizer_config.json", tokenizer_config | {"processor_class": processor})
    (output / TEMPLATE).write_text(LIST_CONTENT + template, encoding="utf-8")
    for name, values in files.items():
        write_json(output / name, values)


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """The tokenizer's own template; a file beside it comes before the configuration's, as in transformers."""
    file = folder / TEMPLATE
    template = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config.get("chat_template")
    if not isinstance(template, str):
        raise UserError(f"{folder} has no chat template ({TEMPLATE}, or chat_template in tokenizer_config.json)")
    return template.removeprefix(LIST_CONTENT)  # a tokenizer taken from an export has it already
