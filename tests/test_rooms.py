"""The rooms of training/: each imports what lies below it, never beside or above."""

import ast
import sys
from pathlib import Path


TRAINING = Path(__file__).resolve().parents[1] / "training"
ROOMS = {
    "base": set(),
    "data": {"base"},
    "attention": {"base"},
    "memory": {"base"},
    "cogvideox": {"base", "memory"},
    "engine": {"base", "attention", "memory"},
    "run": {"base", "data", "attention", "memory", "engine"},
}
BELOW = ROOMS | {"args": {"base"}, "scripts": {*ROOMS, "args"}}
# What base/ has of others besides the standard library: little, and where it is needed alone.
OTHERS_IN_BASE = {
    ("base.dtypes", "torch"),
    ("base.ranks", "torch"),
    ("base.tensor_file", "torch"),
    ("base.bars", "tqdm"),
    ("base.bars", "huggingface_hub"),
}


def files() -> dict[str, Path]:
    paths = [path for path in sorted(TRAINING.rglob("*.py")) if path.stem != "__init__"]
    return {".".join(path.relative_to(TRAINING).with_suffix("").parts): path for path in paths}


def room_of(module: str) -> str:
    """Its folder; of the files beside the folders `args`, or `scripts`."""
    first = module.split(".")[0]
    return first if first in BELOW else "scripts"


def imported(path: Path) -> set[str]:
    """The modules that a file imports, inside of functions too: `from run import hub` is run.hub."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_room = node.module in ROOMS
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_room else {node.module or "."}
    return found


def offences(module: str, imports: set[str], ours: set[str]) -> list[str]:
    """What `module` may not import of `imports`: of ours what lies beside or above, of others what a room does without."""
    room, wrong = room_of(module), set()
    for name in imports:
        target = name.split(".")[0]
        if name in ours or target in ROOMS:
            is_own = room_of(name) == room != "scripts"
            wrong |= set() if is_own or room_of(name) in BELOW[room] else {name}
        elif target == "accelerate" and room in ("data", "attention", "memory", "cogvideox"):
            wrong.add(name)
        elif room in ("base", "args") and target not in sys.stdlib_module_names:
            wrong |= set() if (module, target) in OTHERS_IN_BASE else {name}
    return [f"{module} imports {name}" for name in sorted(wrong)]


def test_rooms_import_only_what_lies_below_them():
    ours = files()
    assert [line for module, path in ours.items() for line in offences(module, imported(path), set(ours))] == []


def test_the_rule_tells_wrong_from_right():
    ours = {"run.hub", "engine.lora", "data.buckets", "memory.host", "args", "doctor", "prepare_dataset"}
    wrong = [
        ("engine.lora", "run.hub"), ("memory.host", "data.buckets"), ("run.hub", "args"), ("engine.lora", "doctor"),
        ("run.hub", "cogvideox.config"), ("prepare_dataset", "doctor"), ("base.files", "torch"), ("args", "numpy"),
        ("memory.host", "accelerate"),
    ]  # fmt: skip
    assert [pair for pair in wrong if not offences(pair[0], {pair[1]}, ours)] == []
    right = [
        ("run.hub", "engine.lora"), ("run.hub", "run.metrics"), ("doctor", "base.errors"), ("base.ranks", "torch"),
        ("run.hub", "accelerate"), ("prepare_dataset", "cogvideox.config"), ("prepare_dataset", "args"),
    ]  # fmt: skip
    assert [pair for pair in right if offences(pair[0], {pair[1]}, ours)] == []


def test_modules_do_not_import_in_a_circle():
    ours = files()
    imports = {module: imported(path) & set(ours) for module, path in ours.items()}
    while free := {module for module, needed in imports.items() if not needed & imports.keys()}:
        imports = {module: needed for module, needed in imports.items() if module not in free}
    assert imports == {}


def test_each_room_says_what_it_promises_and_re_exports_nothing():
    folders = {path.parent.name for path in TRAINING.glob("*/*.py")}
    assert folders == set(ROOMS)
    for room in ROOMS:
        [promise] = (TRAINING / room / "__init__.py").read_text(encoding="utf-8").splitlines()
        assert isinstance(ast.parse(promise).body[0].value, ast.Constant)
