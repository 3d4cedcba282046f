"""The page of flags in Chinese: its headings and introduction, over the tables as they are. Used by make_flags.py."""

import re


# Heading -> its Chinese, and what stands below it in place of the English paragraphs
HEADINGS = {
    "# Flags": ("# 参数", "[English](flags.md) | 中文\n\n由 `python assets/make_flags.py` 从 `training/args.py` 生成；"
                "各脚本的 `--help` 较短，"
                "省去在该脚本里没有用处的参数。多数训练所需的参数，含义已译成中文，其余是英文原文。默认值是不给出参数时的实际取值；*未设*表示没有值，*关*属于不带值的"
                "参数。[返回 README](../README_zh.md)。"),
    "## Training scripts": ("## 训练脚本", "四个脚本的参数相同。只对其中几个脚本有意义的参数，末尾写明是哪些；"
                            "其他脚本会拒绝它。"),
    "## prepare_dataset.py": ("## prepare_dataset.py", ""),
    "## caption_dataset.py": ("## caption_dataset.py", ""),
}  # fmt: skip
GROUPS = {
    "model": "模型",
    "data": "数据",
    "server": "服务器",
    "question": "提问",
    "length of captions": "描述的长度",
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
# Meanings of the flags that most runs need, as flags.md has them; one that was reworded there stays English
MEANINGS = {
    "Model to train, required: a hub id, zai-org/... or THUDM/..., or a local diffusers folder.":
        "要训练的模型，必填：hub 上的名字（zai-org/... 或 THUDM/...），或本地的 diffusers 文件夹。",
    "Folder of videos, images and captions, or with `--load_tensors` of prepared data. prepare_dataset.py writes the "
    "latter. Required, unless there is a `--dataset_file`. An image (png, jpg, webp) is a clip of one frame; "
    "image-to-video leaves it out.":
        "视频、图片和描述所在的文件夹；有 `--load_tensors` 时，是 prepare_dataset.py 写出的预处理数据。"
        "没有 `--dataset_file` 时必填。图片（png、jpg、webp）是只有一帧的片段，图生视频会忽略图片。",
    "Train on prepared data, without the VAE and T5. These are the moments and prompt embeddings that "
    "prepare_dataset.py makes.":
        "用预处理数据训练，不加载 VAE 和 T5。数据是 prepare_dataset.py 写出的潜变量分布和描述的嵌入。",
    "Folder of the result; a run of the same flags there is continued. It holds checkpoints, args.json, metrics.jsonl "
    "and status.json too.":
        "结果所在的文件夹；里面有参数相同的训练时，会继续它。检查点、args.json、metrics.jsonl 和 status.json 也在其中。",
    "Optimizer updates.": "优化器更新的次数，即训练步数。",
    "Clips per batch, on each GPU.": "每张 GPU 上每个批次的片段数。",
    "Peak learning rate.": "学习率的最大值。",
    "What is kept for the backward pass: auto is the fastest level that fits, plan prints what each needs, see "
    "assets/training.md. speed keeps all of it on the GPU; balanced recomputes blocks but keeps the attention's output; "
    "offload is balanced with that in host memory, in full fine-tuning the optimizer states and gradients too; stream "
    "has the blocks' weights there, too. One of":
        "为反向传播保留什么：auto 选放得下的最快级别，plan 打印各级别的用量，见 assets/training_zh.md。speed 全部留在 GPU "
        "上；balanced 重算各个块，但保留注意力的输出；offload 同 balanced，只是放在主机内存，全量微调时优化器状态和梯度也在那里；"
        "stream 把各个块的权重也放在那里。可取",
    "Prompts to render before, during and after training, with ::: between them. They are rendered at every validation "
    "as well as before the first step and after the last.":
        "训练之前、之中和之后用来渲染视频的提示词，多条用 ::: 隔开。第一步之前、每次验证时和最后一步之后都渲染。",
    "Rank of the LoRA. Its size grows with it.": "LoRA 的秩；秩越大，文件越大。",
    "Optimizer in host memory: far less GPU memory, slower steps. Full fine-tuning with adam or adamw in bf16 on one GPU "
    "updates its weights on the GPU, block by block, as at `--memory` offload. Otherwise fp32 weights are there too, and "
    "the CPU updates them.":
        "优化器放在主机内存：显存少得多，每步更慢。在一张 GPU 上以 bf16 和 adam 或 adamw 全量微调时，权重在 GPU 上逐块更新，与 "
        "`--memory` offload 相同；其他情况下 fp32 权重也放在那里，由 CPU 更新。",
}  # fmt: skip


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
    for english, chinese in MEANINGS.items():
        block = block.replace(f"| {english}", f"| {chinese}")
    return block
