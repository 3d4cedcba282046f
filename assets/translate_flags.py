"""The page of flags in Chinese: its headings and introduction, over the tables as they are. Used by make_flags.py."""

import re


# Heading -> its Chinese, and what stands below it in place of the English paragraphs
HEADINGS = {
    "# Flags": ("# 参数", "[English](flags.md) | 中文\n\n由 `python assets/make_flags.py` 从 `training/args.py` 生成；"
                "各脚本的 `--help` 内容相同。含义是英文原文。默认值一栏，*未设*表示没有值，*关*表示不带值的参数未给出。"
                "[返回 README](../README_zh.md)。"),
    "## Training scripts": ("## 训练脚本", "四个脚本的参数相同。只对其中几个脚本有意义的参数，末尾写明是哪些；"
                            "其他脚本会拒绝它。"),
    "## prepare_dataset.py": ("## prepare_dataset.py", ""),
}  # fmt: skip
GROUPS = {
    "model": "模型",
    "data": "数据",
    "buckets": "桶",
    "training": "训练",
    "conditioning and noise": "条件与噪声",
    "optimizer": "优化器",
    "learning rate": "学习率",
    "checkpoints": "检查点",
    "validation": "验证",
    "validation videos": "验证视频",
    "memory": "显存",
    "memory and speed": "显存与速度",
    "speed": "速度",
    "tracking and hub": "跟踪器与 hub",
    "output": "输出",
    "other": "其他",
}
WORDS = {
    "| Flag | Default | Meaning |": "| 参数 | 默认值 | 含义 |",
    "*unset*": "*未设*",
    "*off*": "*关*",
    "*required*": "*必填*",
    "*LoRA only.*": "*仅 LoRA。*",
    "*Full fine-tuning only.*": "*仅全量微调。*",
    "*Image-to-video only.*": "*仅图生视频。*",
}


def in_chinese(page: str) -> str:
    """The page with Chinese headings, introduction and column heads; a group without a translation keeps its title."""
    blocks = page.rstrip("\n").split("\n\n")
    return "\n\n".join(filter(None, map(block_in_chinese, blocks))) + "\n"


def block_in_chinese(block: str) -> str:
    """A heading or table, translated; "" for a paragraph, whose Chinese came with its heading."""
    if block in HEADINGS:
        return "\n\n".join(filter(None, HEADINGS[block]))
    if block.startswith("#"):
        return re.sub(r"^(#+) (.*)", lambda match: f"{match[1]} {GROUPS.get(match[2], match[2])}", block)
    if not block.startswith("|"):
        return ""
    for english, chinese in WORDS.items():
        block = block.replace(english, chinese)
    return block
