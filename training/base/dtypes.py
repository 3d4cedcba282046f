"""Dtypes by name."""

import torch


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # in flags
# In safetensors files, narrow to wide
FILE_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
WEIGHT_DTYPES = {code: FILE_DTYPES[code] for code in ("F32", "F16", "BF16")}  # of models that can be trained
