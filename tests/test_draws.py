"""No two draws of training share a name: with equal names they would be the same numbers, and depend on one another."""

import ast
from collections import Counter

import pytest

from test_structure import MODULES, TRAINING_SCRIPTS, calls, dotted, parse


# draw_seed and all that passes a name on to it; the dataset's own is a method
DRAWS = {"draw_seed", "draw_generator", "draw_normal", "draw_uniform", "self.draw"}


def is_draw(call: ast.Call) -> bool:
    return dotted(call.func).removeprefix("objective.") in DRAWS


def draw_names(tree: ast.Module) -> list[str]:
    """The name that each draw in the source is made by; of an f-string, all that is fixed."""
    texts = [argument for call in calls(tree) if is_draw(call) for argument in call.args[:2]]
    parts = [text.values if isinstance(text, ast.JoinedStr) else [text] for text in texts]
    constants = [[part.value for part in text if isinstance(part, ast.Constant)] for text in parts]
    return ["".join(text) for text in constants if text and isinstance(text[0], str)]


@pytest.mark.parametrize("script", [*TRAINING_SCRIPTS, "prepare_dataset"])
def test_no_two_draws_have_one_name(script):
    modules = [script, *(module for module in MODULES if module not in (*TRAINING_SCRIPTS, "prepare_dataset"))]
    # Those of held-out clips and of preparing are no training's: they have a seed of their own, or a name with the clip
    names = Counter(name for module in modules for name in draw_names(parse(module)))
    assert not [name for name, count in names.items() if count > 1]
    assert {"order", "start", "flip", "crop", "timestep", "strata", "lora_init", "validation"} <= names.keys()
    if script != "prepare_dataset":
        assert {"noise", "posterior", "text_dropout"} <= names.keys()
    if "image" in script:
        assert {"image_noise", "image_sigma", "image_posterior", "image_dropout", "image_variant"} <= names.keys()


def test_the_rule_sees_names():
    source = "objective.draw_normal(seed, 'noise', p, s)\nself.draw('flip', epoch, 1)\ndraw_generator(seed, f'image/{stem}')"
    assert draw_names(ast.parse(source)) == ["noise", "flip", "image/"]
