"""The rules of the layout, read from the source of every module in training/."""

import ast
import difflib
import functools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "training").with_suffix("").parts)
    for path in (ROOT / "training").rglob("*.py")
    if path.stem != "__init__"
)


def is_script(module: str) -> bool:
    return module in ("caption_dataset", "prepare_dataset", "doctor") or module.startswith("cogvideox_")


SCRIPTS = {module for module in MODULES if is_script(module)}


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / "training" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- names


def test_module_names_hide_no_package():
    own = {
        path.stem
        for folder in ("training", "tests", "benchmarks", "tiny_model")
        for path in (ROOT / folder).glob("*.py")
    }
    own |= {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")}
    assert not own & (sys.stdlib_module_names | packages_distributions().keys())


# ---------------------------------------------------------------- rules
# What ruff cannot say. Each takes the tree of a module and returns the lines that break it.


def dotted(node: ast.AST) -> str:
    """`torch.load` for the expression of that name, "" for anything that is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(tree: ast.Module) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((item.value for item in call.keywords if item.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def changed_args(tree: ast.Module) -> list[int]:
    """Flags are what was given: nothing is stored in `args`, by attribute, item, setattr or update."""
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and re.match(r"args\b|vars\(args\)", ast.unparse(node.value))
    ]
    for call in calls(tree):
        stores = dotted(call.func) in ("setattr", "delattr") and ast.unparse(call.args[0]) == "args"
        if stores or ast.unparse(call.func) in ("vars(args).update", "args.__dict__.update"):
            lines.append(call.lineno)
    return lines


def reassigned_args(tree: ast.Module) -> list[int]:
    """`args` is bound once, to what was parsed."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "args"]
    return [node.lineno for node in names if isinstance(node.ctx, ast.Store | ast.Del)][1:]


def unsafe_loads(tree: ast.Module) -> list[int]:
    """torch.load runs code from the file unless weights_only=True; so does numpy with allow_pickle, and a hub's model."""
    loads = [call for call in calls(tree) if dotted(call.func) == "torch.load"]
    lines = [call.lineno for call in loads if not is_true(keyword(call, "weights_only"))]
    lines += [call.lineno for call in calls(tree) if keyword(call, "allow_pickle") is not None]
    return lines + [call.lineno for call in calls(tree) if is_true(keyword(call, "trust_remote_code"))]


def family_names(tree: ast.Module) -> list[int]:
    """Identifiers that name CogVideoX; texts for users may."""
    fields = {"id", "attr", "arg", "name", "asname", "module"}
    return [
        getattr(node, "lineno", 0)
        for node in ast.walk(tree)
        for name, value in ast.iter_fields(node)
        if name in fields and isinstance(value, str) and "cogvideo" in value.lower()
    ]


def loads_without_dtype(tree: ast.Module) -> list[int]:
    """A model loaded without dtype comes in fp32 from diffusers and in the file's own from transformers."""
    no_models = re.compile(r"(tokenizer|scheduler|config)\w*\.from_pretrained$", re.IGNORECASE)
    return [
        call.lineno
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
        if not no_models.search(ast.unparse(call.func))
        if keyword(call, "dtype") is None and keyword(call, "torch_dtype") is None
    ]


class Examples(NamedTuple):
    """Where a rule holds, and sources that it forbids and lets pass."""

    modules: set[str]
    wrong: list[str]
    right: list[str] = []


EVERYWHERE = set(MODULES)
RULES = {
    changed_args: Examples(
        [module for module in MODULES if module not in ("args", "base.flag_parser")],
        [
            "args.seed = 1", "args.seed += 1", "del args.seed", "vars(args)['seed'] = 1", "setattr(args, 'seed', 1)",
            "vars(args).update(seed=1)",
        ],
        ["seed = args.seed\nsettings['seed'] = args.seed"],
    ),
    reassigned_args: Examples([module for module in MODULES if module not in ("args", "base.flag_parser")], ["args = parse()\nargs = other(args)"], ["args = parse()"]),
    unsafe_loads: Examples(
        EVERYWHERE,
        [
            "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
            "f(trust_remote_code=True)",
        ],
        ["torch.load(path, weights_only=True)"],
    ),
    family_names: Examples(
        [module for module in MODULES if not module.startswith("cogvideox.") and module not in SCRIPTS],
        ["import cogvideox", "from diffusers import CogVideoXPipeline as Pipeline", "def load_cogvideox(): pass"],
        ["default = 'THUDM/CogVideoX-2b'"],
    ),
    loads_without_dtype: Examples(
        EVERYWHERE,
        ["T5EncoderModel.from_pretrained(path)", "pipeline_class.from_pretrained(path, **options)"],
        ["Model.from_pretrained(path, dtype=dtype)\nAutoTokenizer.from_pretrained(path)"],
    ),
}  # fmt: skip
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@by_rule
def test_rule_holds(rule):
    offenders = [
        f"training/{module}.py:{line}" for module in sorted(RULES[rule].modules) for line in rule(parse(module))
    ]
    assert offenders == [], rule.__doc__


@by_rule
def test_rule_tells_wrong_from_right(rule):
    assert [source for source in RULES[rule].wrong if not rule(ast.parse(source))] == []
    assert [source for source in RULES[rule].right if rule(ast.parse(source))] == []


# ---------------------------------------------------------------- flags


def flags_read(tree: ast.Module) -> set[str]:
    """Names of flags that the module reads, as args.<name>."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) == "args"}


# By args.py itself, which takes over another run's flags and sets up the console; by getattr, in validation.sample_size
READ_OTHERWISE = {"config", "height", "verbose", "width"}
PARSERS = {"args", "base.flag_parser", "base.flag_checks"}


@pytest.mark.parametrize("make_parser", ["make_training_parser", "make_prepare_parser", "make_caption_parser"])
def test_every_flag_is_read_outside_of_the_parser(make_parser):
    """A flag that is parsed and checked, and then forgotten, is a lie in --help."""
    import args

    is_training = make_parser == "make_training_parser"
    parser = args.make_training_parser("t2v_lora") if is_training else getattr(args, make_parser)()
    own = {
        "make_prepare_parser": {"prepare_dataset", "run.prepare_plan"}, "make_caption_parser": {"caption_dataset"},
    }  # fmt: skip
    shared = {"data.dataset", "run.launch"} if make_parser == "make_prepare_parser" else set()
    readers = set(MODULES) - set().union(*own.values()) - PARSERS if is_training else own[make_parser] | shared
    read = set().union(*(flags_read(parse(module)) for module in readers)) | READ_OTHERWISE
    unread = {action.dest for action in parser._actions} - {"help"} - read
    assert not unread


def test_the_rule_on_flags_sees_reading_alone():
    assert flags_read(ast.parse("name, other.seed = 'alpha', f(args.rank)")) == {"rank"}


def functions_with_args(tree: ast.Module) -> set[str]:
    """Names of the functions and methods that take `args`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if any(parameter.arg == "args" for parameter in node.args.args)}


def names_used(tree: ast.Module) -> set[str]:
    """Names that a module reads or imports, attributes included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name | ast.Attribute):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def misnamed(trees: dict[str, ast.Module], free: set[str]) -> list[str]:
    """Functions that take `args` and are called from other files are *_from_args; a file's own helpers are not."""
    used, wrong = {module: names_used(tree) for module, tree in trees.items()}, []
    for module in trees.keys() - free:
        elsewhere = set().union(*(names for other, names in used.items() if other != module))
        taking = functions_with_args(trees[module])
        wrong += [f"{module}.{name}" for name in taking if name.endswith("_from_args") != (name in elsewhere)]
    return sorted(wrong)


def test_builders_from_flags_are_named_so():
    """Below run/, whose services take `args` anyway. The checks of flags in base/ are about nothing else."""
    free = PARSERS | SCRIPTS | {module for module in MODULES if module.startswith("run.")}
    assert misnamed({module: parse(module) for module in MODULES}, free) == []


def test_the_rule_on_builders_tells_wrong_from_right():
    user = ast.parse("from data.a import make_from_args, build\nmodel.read_from_args(args)")
    names = ["make_from_args", "read_from_args", "own", "build", "own_from_args"]
    room = ast.parse("\n".join(f"def {name}(args): pass" for name in names))
    assert misnamed({"data.a": room, "run.b": user}, {"run.b"}) == ["data.a.build", "data.a.own_from_args"]


# ---------------------------------------------------------------- the four training scripts

TRAINING_SCRIPTS = [module for module in MODULES if module.startswith("cogvideox_")]
# What a task does in its own way: which engine, whether all of it fits, image-to-video's first frame, and draws
OWN_SERVICES = {
    "compose.build_lora_engine_from_args", "compose.build_sft_engine_from_args",
    "encoding.IMAGE_NOISE_MEAN", "encoding.IMAGE_NOISE_STD", "encoding.encode_noised_images", "encoding.pixels_to_unit",
    "inputs.sample_image_latents", "inputs.condition_on_first_frame", "inputs.ofs_input", "inputs.latent_shape",
    "objective.draw_normal", "objective.draw_uniform",
}  # fmt: skip


def services(tree: ast.Module) -> list[str]:
    """What a script uses of the project's modules and of what it makes of them, in the order of the source: `checkpoints.save`."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.module in MODULES or any(m.startswith(f"{node.module}.") for m in MODULES)]
    roots = {alias.asname or alias.name for node in own for alias in node.names} | {
        "meter",
        "validate",
        "encode",
        "losses_of",
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    names = sorted((node.lineno, node.col_offset, dotted(node)) for node in nodes if id(node) not in inner)
    return [name for *_, name in names if name.split(".")[0] in roots]


def test_scripts_call_the_same_services_in_the_same_order():
    """Each script reads by itself, so that it can be copied; none may miss what another does."""
    assert len(TRAINING_SCRIPTS) == 4
    common = {m: [s for s in services(parse(m)) if s not in OWN_SERVICES] for m in TRAINING_SCRIPTS}
    reference = common["cogvideox_text_to_video_lora"]
    assert len(reference) > 60 and {"checkpoints.save", "validation.validate", "update", "meter.add"} <= set(reference)
    for module in TRAINING_SCRIPTS:
        assert list(difflib.unified_diff(reference, common[module], "text_to_video_lora", module)) == []
