"""The page of flags in Chinese: its headings and introduction, over the tables as they are. Used by make_flags.py."""

import re


# Heading -> its Chinese, and what stands below it in place of the English paragraphs
HEADINGS = {
    "# Flags": ("# 参数", "[English](flags.md) | 中文\n\n由 `python assets/make_flags.py` 从 `training/args.py` 生成；"
                "各脚本的 `--help` 较短，"
                "省去在该脚本里没有用处的参数。含义是英文原文。默认值是不给出参数时的实际取值；*未设*表示没有值，*关*属于不带值的"
                "参数。[返回 README](../README_zh.md)。"),
    "## Training scripts": ("## 训练脚本", "四个脚本的参数相同。只对其中几个脚本有意义的参数，末尾写明是哪些；"
                            "其他脚本会拒绝它。"),
    "## prepare_dataset.py": ("## prepare_dataset.py", ""),
}  # fmt: skip
GROUPS = {
    "model": "模型",
    "data": "数据",
    "sizes": "尺寸",
    "sizes of raw videos (prepared data keeps its own)": "原始视频的尺寸（预处理数据保持自己的尺寸）",
    "training": "训练",
    "optimizer and learning rate": "优化器与学习率",
    "output": "输出",
    "output and checkpoints": "输出与检查点",
    "validation": "验证",
    "memory and speed": "显存与速度",
    "logging": "日志",
    "logging and upload": "日志与上传",
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
