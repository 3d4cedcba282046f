#!/usr/bin/env python
"""Write assets/flags.md and flags_zh.md: every flag of the scripts with its default and meaning, from training/args.py.

python assets/make_flags.py
"""

import argparse
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from translate_flags import in_chinese

from args import make_caption_parser, make_prepare_parser, make_training_parser
from base.flag_parser import NO_MEANING, SCRIPTS, parts_of_help


PAGE = Path(__file__).resolve().with_name("flags.md")
HEAD = """# Flags

English | [中文](flags_zh.md)

Made from `training/args.py` by `python assets/make_flags.py`. `--help` of each script is shorter: it leaves out what has
no use there. The default is what holds where a flag is left out; *unset* is no value, *off* belongs to a flag that takes
none. [Back to the README](../README.md).
"""
TRAINING = """
## Training scripts

The four scripts take the same flags. Where a flag has no meaning in some of them, its last words say which have a use
for it; the others refuse it.
"""
PREPARE = """
## prepare_dataset.py
"""
CAPTION = """
## caption_dataset.py
"""
# What keeps its small letter
NAMES = re.compile(r"(adam|fp32|prodigy|sage|torch\.compile|wandb)\b")
# Scripts that take a flag -> what its row ends with
TAKEN_BY = {
    frozenset(SCRIPTS): "",
    frozenset({"t2v_lora", "i2v_lora"}): "*LoRA only.*",
    frozenset({"t2v_sft", "i2v_sft"}): "*Full fine-tuning only.*",
    frozenset({"i2v_lora", "i2v_sft"}): "*Image-to-video only.*",
}


def flags_page() -> str:
    """The text of the page."""
    training = make_training_parser(next(iter(SCRIPTS)))
    text = HEAD + TRAINING + tables(training, taken_by)
    for heading, parser in ((PREPARE, make_prepare_parser()), (CAPTION, make_caption_parser())):
        text += heading + tables(parser, lambda dest: "")
    return text


def tables(parser: argparse.ArgumentParser, ending) -> str:
    """A heading and a table for each group of flags; `ending` gives the last words on a flag."""
    text = ""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            rows = "".join(row(action, ending(action.dest)) for action in actions)
            text += f"\n### {group.title}\n\n| Flag | Default | Meaning |\n|---|---|---|\n{rows}"
    return text


def row(action: argparse.Action, ending: str) -> str:
    short, more, default = parts_of_help(action)
    parts = [sentence(as_markdown(short)), *([as_markdown(more)] if more else [])]
    if action.choices:
        some = "Any" if action.nargs else "One"
        parts.append(f"{some} of {', '.join(f'`{choice}`' for choice in action.choices)}.")
    parts += [ending] if ending else []
    return f"| `{action.option_strings[0]}` | {default_of(action, default)} | {' '.join(parts)} |\n"


def default_of(action: argparse.Action, text: str) -> str:
    """`text` is what holds without the flag; as code where it is the parsed value."""
    if action.required:
        return "*required*"
    if text:
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"`{text}`" if text == " ".join(map(str, values)) else as_markdown(text)
    return "*off*" if action.default is False else "*unset*"


def as_markdown(text: str) -> str:
    """Flags as code, and nothing else taken for markup."""
    text = re.sub(r"([<|*])", r"\\\1", text)
    return re.sub(r"(?<!\w)--[a-z]\w*", lambda flag: f"`{flag[0]}`", text)


def sentence(text: str) -> str:
    """A capital in front, unless the first word is a name, and a full stop."""
    if not NAMES.match(text):
        text = text[0].upper() + text[1:]
    return f"{text}."


def taken_by(dest: str) -> str:
    return TAKEN_BY[frozenset(script for script in SCRIPTS if dest not in NO_MEANING[script])]


def main():
    twin = PAGE.with_name("flags_zh.md")
    for page, text in {PAGE: flags_page(), twin: in_chinese(flags_page())}.items():
        page.write_text(text, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
