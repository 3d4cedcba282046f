"""The rules of the layout, read from the source of every module in training/."""

import ast
import functools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / "training").glob("*.py"))

# Layers: each imports only what lies below it. L0 is the standard library alone; the parts of L1 do not import one
# another, except that dataset, prepared files, attention and lora have rooms of their own, and T5 is streamed where it is used; only L2 and L3 know accelerate and the flags.
PURE = {
    "args",
    "buckets",
    "console",
    "draws",
    "durable",
    "errors",
    "file_kinds",
    "hashes",
    "memory_plan",
    "signals",
    "status",
    "toolchain",
}
DATA_ROOMS = {"formats", "containers", "picture", "headers", "decode", "cache", "prepared", "report"}
ROOMS = {
    "dataset": DATA_ROOMS, "decode": {"picture", "headers"}, "headers": {"picture", "containers"}, "picture": {"containers"}, "attention_trial": {"attention"}, "cogvideox": {"bars", "streaming"},
    "lora": {"lora_file"}, "prepared": {"cache"},
}  # fmt: skip
PARTS = DATA_ROOMS | {
    "bars", "dataset", "cogvideox", "objective", "lora", "lora_file", "sft", "optimizers", "curves",
    "memory", "attention", "attention_trial", "streaming", "quantization", "norm_rope", "masters", "zero", "allocator",
}  # fmt: skip
SERVICES = {
    "runtime", "captions", "meter", "engine", "planning", "update", "checkpointing", "tracking", "held_out", "validation", "hub", "export",
}  # fmt: skip


def is_script(module: str) -> bool:
    return module in ("prepare_dataset", "doctor") or module.startswith("cogvideox_")


SCRIPTS = {module for module in MODULES if is_script(module)}

MAX_FUNCTION_LINES, MAX_SCRIPT_MAIN_LINES = 60, 130


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / "training" / f"{module}.py").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- layers


def imported_modules(tree: ast.Module) -> set[str]:
    """Top-level names of everything imported, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def allowed_modules(module: str) -> set[str]:
    """The modules of training/ that `module` may import."""
    if module in PURE:
        return PURE
    if module in PARTS:
        return (PURE - {"args"}) | ROOMS.get(module, set())
    return PURE | PARTS | SERVICES


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_layer_and_imports_only_below(module):
    assert module in PURE | PARTS | SERVICES | SCRIPTS, "name its layer in this file"
    imported = imported_modules(parse(module))
    assert imported & set(MODULES) <= allowed_modules(module)
    if module in PURE:
        assert imported - set(MODULES) <= sys.stdlib_module_names
    if module in PARTS:
        assert "accelerate" not in imported


def test_services_do_not_import_in_a_circle():
    imports = {module: imported_modules(parse(module)) & SERVICES for module in SERVICES & set(MODULES)}
    while free := {module for module, needed in imports.items() if not needed & imports.keys()}:
        imports = {module: needed for module, needed in imports.items() if module not in free}
    assert not imports


def test_module_names_hide_no_package():
    own = {
        path.stem
        for folder in ("training", "tests", "benchmarks", "tiny_model")
        for path in (ROOT / folder).glob("*.py")
    }
    assert not own & (sys.stdlib_module_names | packages_distributions().keys())


# ---------------------------------------------------------------- rules
# Each takes the tree of a module and returns the lines that break it.


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
    """torch.load runs code from the file unless weights_only=True; so does numpy with allow_pickle."""
    loads = [call for call in calls(tree) if dotted(call.func) == "torch.load"]
    lines = [call.lineno for call in loads if not is_true(keyword(call, "weights_only"))]
    return lines + [call.lineno for call in calls(tree) if keyword(call, "allow_pickle") is not None]


def code_from_text(tree: ast.Module) -> list[int]:
    """No text becomes code or a shell command."""
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput"}
    lines = [call.lineno for call in calls(tree) if dotted(call.func) in forbidden]
    lines += [call.lineno for call in calls(tree) if is_true(keyword(call, "shell"))]
    unsafe = {"cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    return lines + pickle_uses(tree) + ([1] if imported_modules(tree) & unsafe else [])


def pickle_uses(tree: ast.Module) -> list[int]:
    """All of pickle but its errors, which torch.load raises."""
    nodes = list(ast.walk(tree))
    modules = [node for node in nodes if isinstance(node, ast.Import) and any(a.name == "pickle" for a in node.names)]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
    named = [node for node in imports if {alias.name for alias in node.names} - {"UnpicklingError", "PickleError"}]
    return [node.lineno for node in modules + named]


def swallowed_errors(tree: ast.Module) -> list[int]:
    """Handlers name the errors they expect; one for everything ends by raising the error again or by reporting it."""
    lines = []
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
        names = re.findall(r"\w+", ast.unparse(handler.type)) if handler.type else ["BaseException"]
        is_broad = {"Exception", "BaseException"} & set(names)
        reports = [call for call in calls(handler.body[-1]) if handler.name in map(ast.unparse, call.args)]
        if is_broad and not reports and not isinstance(handler.body[-1], ast.Raise):
            lines.append(handler.lineno)
    return lines


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


def long_functions(tree: ast.Module, main_limit: int = MAX_FUNCTION_LINES) -> list[int]:
    """Functions of more than 60 lines; a script's main may have `main_limit`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        node.lineno
        for node in functions
        if node.end_lineno - node.lineno >= (main_limit if node.name == "main" else MAX_FUNCTION_LINES)
    ]


RULES = [unsafe_loads, code_from_text, swallowed_errors, loads_without_dtype]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rule", RULES)
def test_rule_holds_everywhere(rule, module):
    assert rule(parse(module)) == [], rule.__doc__


@pytest.mark.parametrize("module", [module for module in MODULES if module != "args"])
@pytest.mark.parametrize("rule", [changed_args, reassigned_args])
def test_flags_are_never_changed_after_parsing(rule, module):
    assert rule(parse(module)) == [], rule.__doc__


@pytest.mark.parametrize("module", [module for module in MODULES if module != "cogvideox" and module not in SCRIPTS])
def test_only_the_family_and_the_scripts_name_it(module):
    assert family_names(parse(module)) == [], family_names.__doc__


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_a_screen(module):
    main_limit = MAX_SCRIPT_MAIN_LINES if module in SCRIPTS else MAX_FUNCTION_LINES
    assert long_functions(parse(module), main_limit) == [], long_functions.__doc__


# ---------------------------------------------------------------- the rules themselves


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (changed_args, "args.seed = 1"),
        (changed_args, "args.seed += 1"),
        (changed_args, "del args.seed"),
        (changed_args, "vars(args)['seed'] = 1"),
        (changed_args, "setattr(args, 'seed', 1)"),
        (changed_args, "vars(args).update(seed=1)"),
        (reassigned_args, "args = parse()\nargs = other(args)"),
        (unsafe_loads, "torch.load(path)"),
        (unsafe_loads, "torch.load(path, weights_only=False)"),
        (unsafe_loads, "np.load(path, allow_pickle=True)"),
        (code_from_text, "eval(text)"),
        (code_from_text, "os.system(text)"),
        (code_from_text, "subprocess.run(text, shell=True)"),
        (code_from_text, "def f():\n    import pickle"),
        (code_from_text, "from pickle import loads"),
        (swallowed_errors, "try:\n    f()\nexcept:\n    pass"),
        (swallowed_errors, "try:\n    f()\nexcept (OSError, Exception):\n    g()"),
        (family_names, "import cogvideox"),
        (family_names, "from diffusers import CogVideoXPipeline as Pipeline"),
        (family_names, "def load_cogvideox(): pass"),
        (loads_without_dtype, "T5EncoderModel.from_pretrained(path)"),
        (loads_without_dtype, "pipeline_class.from_pretrained(path, **options)"),
        (long_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    ],
)
def test_rule_finds_what_it_forbids(rule, source):
    assert rule(ast.parse(source))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (changed_args, "seed = args.seed\nsettings['seed'] = args.seed"),
        (unsafe_loads, "torch.load(path, weights_only=True)"),
        (code_from_text, "model.eval()"),
        (code_from_text, "from pickle import UnpicklingError"),
        (swallowed_errors, "try:\n    f()\nexcept Exception:\n    g()\n    raise"),
        (family_names, "default = 'THUDM/CogVideoX-2b'"),
        (loads_without_dtype, "Model.from_pretrained(path, dtype=dtype)\nAutoTokenizer.from_pretrained(path)"),
        (long_functions, "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    ],
)
def test_rule_lets_pass_what_is_right(rule, source):
    assert not rule(ast.parse(source))


# ---------------------------------------------------------------- flags


def flags_read(tree: ast.Module) -> set[str]:
    """Names of flags that the module reads, as args.<name>."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) == "args"}


# By args.py itself, which takes over another run's flags and sets up the console; by getattr, in validation.sample_size_from_args
READ_OTHERWISE = {"config", "height", "verbose", "width"}


@pytest.mark.parametrize("make_parser", ["make_training_parser", "make_prepare_parser"])
def test_every_flag_is_read_outside_of_the_parser(make_parser):
    """A flag that is parsed and checked, and then forgotten, is a lie in --help."""
    import args

    is_prepare = make_parser == "make_prepare_parser"
    parser = args.make_prepare_parser() if is_prepare else args.make_training_parser("t2v_lora")
    readers = {"prepare_dataset", "dataset", "runtime"} if is_prepare else set(MODULES) - {"args", "prepare_dataset"}
    read = set().union(*(flags_read(parse(module)) for module in readers)) | READ_OTHERWISE
    unread = {action.dest for action in parser._actions} - {"help"} - read
    assert not unread


def test_the_rule_on_flags_sees_reading_alone():
    assert flags_read(ast.parse("name, other.seed = 'alpha', f(args.rank)")) == {"rank"}


# ---------------------------------------------------------------- the four training scripts

TRAINING_SCRIPTS = [module for module in MODULES if module.startswith("cogvideox_")]
# What a task does in its own way: which engine and pipeline, and image-to-video's first frame; and copying of all draws.
OWN_NAMES = {
    "build_lora_engine_from_args", "build_sft_engine_from_args", "check_sft_fits_from_args",
    "IMAGE_TO_VIDEO_PIPELINE", "TEXT_TO_VIDEO_PIPELINE", "IMAGE_NOISE_MEAN", "IMAGE_NOISE_STD",
    "encode_images", "sample_image_latents", "condition_on_first_frame", "ofs_input", "to_device",
}  # fmt: skip


def project_names(module: str) -> list[str]:
    """The project's own functions and constants that the script uses, in the order of the source, wherever it does."""
    tree = parse(module)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES
        for alias in node.names
    }
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in imported - OWN_NAMES]
    return [node.id for node in sorted(names, key=lambda node: (node.lineno, node.col_offset))]


@pytest.mark.parametrize("module", TRAINING_SCRIPTS)
def test_scripts_call_the_same_services_in_the_same_order(module):
    """Each script reads by itself, so that it can be copied; none may miss what another does."""
    reference = project_names("cogvideox_text_to_video_lora")
    ours = project_names(module)
    if "image" in module:
        # Draws more: which images are dropped, the noise on first frames and its size, and that of the image latents
        del ours[ours.index("draw_uniform") + 1]
        for name, place in (
            ("draw_normal", "pixels_to_unit"), ("draw_normal", "pixels_to_unit"),
            ("draw_normal", "sample_latents"), ("latent_shape", "sample_latents"),
        ):  # fmt: skip
            del ours[ours.index(name, ours.index(place))]
    if "sft" in module:
        del ours[ours.index("num_parameters", ours.index("compute_dtype_from_args"))]  # does all of it fit?
    assert len(reference) > 40
    assert ours == reference


def test_there_are_four_training_scripts():
    assert len(TRAINING_SCRIPTS) == 4
