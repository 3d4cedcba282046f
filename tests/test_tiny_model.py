"""The small model's world, judge and scripts; what the shipped model reaches is measured by the slow tests at the end."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import contact_sheet
import judge as judging
import measure
import networks
import pretrain
import recipes
import world


ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = [row for concept in (None, *world.CONCEPTS) for row in world.all_contents(concept)]


def sample_contents(count, seed=0):
    """Contents of all the world, concepts too."""
    order = torch.randperm(len(EVERYTHING), generator=torch.Generator().manual_seed(seed))[:count]
    return [EVERYTHING[index] for index in order.tolist()]


# ---------------------------------------------------------------- world


def test_clips_depend_on_seed_and_place_alone():
    contents = torch.tensor(sample_contents(6))
    clips = world.draw_clips(contents, seed=3, place=1)
    assert torch.equal(clips, world.draw_clips(contents, seed=3, place=1))
    assert not torch.equal(clips, world.draw_clips(contents, seed=4, place=1))
    assert not torch.equal(clips, world.draw_clips(contents, seed=3, place=2))
    assert clips.shape == (6, 9, 3, 64, 64) and clips.min() >= 0 and clips.max() <= 1


def test_seventeen_frames_are_the_same_motion_in_finer_steps():
    contents = torch.tensor(sample_contents(6))
    assert torch.allclose(
        world.draw_clips(contents, 0, num_frames=17)[:, ::2], world.draw_clips(contents, 0), atol=1e-5
    )


def test_no_shape_leaves_the_picture():
    contents = torch.tensor(sample_contents(300))
    geometry = world.draw_geometry(contents, torch.Generator().manual_seed(0))
    reach = geometry.radius[:, None] * world.REACH
    for centre in (geometry.start, geometry.end):
        assert (centre - reach >= -1e-3).all() and (centre + reach <= world.SIZE + 1e-3).all()


def test_what_pretraining_never_shows():
    shown = {tuple(row) for row in world.training_contents().tolist()}
    assert len(shown) > 3000
    words = {word for row in shown for word in world.words_of(row).values()}
    assert not words & world.CONCEPTS.keys()
    tested = world.test_contents()
    assert len(set(tested)) == 100
    assert not {row[:3] for row in tested} & {row[:3] for row in shown}  # shape, colour and direction together
    for first, second in ((0, 1), (0, 2), (1, 2)):  # any two of them are known
        assert {(row[first], row[second]) for row in tested} <= {(row[first], row[second]) for row in shown}


@pytest.mark.parametrize("concept", world.CONCEPTS)
def test_a_concept_is_tested_on_what_was_not_taught(concept):
    name = world.CONCEPTS[concept]
    taught, tested = world.teaching_contents(concept), world.test_contents(50, concept)
    assert len(set(taught)) == 12 and len(set(tested)) == 50
    assert {world.words_of(row)[name] for row in [*taught, *tested]} == {concept}
    assert not {row[:3] for row in taught} & {row[:3] for row in tested}
    assert {row[2] for row in taught} == {0, 1, 2, 3}  # all directions


def test_captions_say_everything():
    row = world.content(
        shape="ring", colour="orange", direction="up", speed="slowly", background="olive", pattern="plain"
    )
    assert world.caption(row) == "An orange ring moves slowly up over an olive background."
    for row in sample_contents(40):
        wordings = {world.caption(row, wording) for wording in range(world.NUM_WORDINGS)}
        assert len(wordings) == world.NUM_WORDINGS
        assert world.caption(row, 3 + world.NUM_WORDINGS) == world.caption(row, 3)
        words = world.words_of(row)
        for text in wordings:
            named = [word for name, word in words.items() if name != "direction" and word != "plain"]
            assert all(word in text for word in named)
            assert any(phrase in text for phrase in world.DIRECTION_WORDS[words["direction"]])
    assert len({world.caption(row) for row in EVERYTHING}) == len(EVERYTHING)


def test_a_dataset_folder_is_what_the_judge_sees_and_the_captions_say(tmp_path):
    contents = world.teaching_contents("pink")
    world.write_dataset(tmp_path, contents)
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    videos = (tmp_path / "videos.txt").read_text().splitlines()
    assert prompts == [world.caption(row, number) for number, row in enumerate(contents)]
    clips = torch.stack([read_clip(tmp_path / name) for name in videos])
    assert judging.judge(clips) == [world.words_of(row) for row in contents]


def read_clip(path):
    import av

    with av.open(path) as video:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2) / 255


# ---------------------------------------------------------------- judge


def blurred(clips, times):
    for _ in range(times):
        clips = judging.smooth(clips)
    return clips


DAMAGES = {
    "none": lambda clips: clips,
    "noise of 26 dB": lambda clips: (clips + 0.05 * torch.randn_like(clips)).clamp(0, 1),
    "blur": lambda clips: blurred(clips, 3),
    "half the resolution": lambda clips: F.interpolate(
        F.interpolate(clips.flatten(0, 1), size=32, mode="area"), size=64, mode="bilinear"
    ).view(clips.shape),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_judge_reads_real_clips(damage):
    torch.manual_seed(0)
    contents = sample_contents(100, seed=1)
    scores = judging.accuracy(judging.judge(DAMAGES[damage](world.draw_clips(torch.tensor(contents), 7))), contents)
    assert min(scores.values()) >= 0.99, scores


def test_the_judge_sees_nothing_where_nothing_is_and_no_direction_in_a_still():
    torch.manual_seed(0)
    contents = sample_contents(4)
    clips = world.draw_clips(torch.tensor(contents), 7)
    for empty in (torch.rand_like(clips), torch.full_like(clips, 0.3)):
        for verdict in judging.judge(empty):
            assert {verdict[name] for name in ("shape", "colour", "direction", "speed")} == {None}
    still = judging.judge(clips[:, :1].expand_as(clips))
    assert [verdict["direction"] for verdict in still] == [None] * 4
    assert [verdict["shape"] for verdict in still] == [world.words_of(row)["shape"] for row in contents]


def test_the_judge_tells_a_wrong_clip():
    contents = sample_contents(30)
    backwards = world.draw_clips(torch.tensor(contents), 7).flip(1)
    scores = judging.accuracy(judging.judge(backwards), contents)
    assert scores["direction"] == scores["caption"] == 0 and scores["shape"] == 1
    clips = world.draw_clips(torch.tensor(contents), 7)
    half = torch.cat([clips[:15], clips[:15]])  # 15 clips of other captions
    assert judging.accuracy(judging.judge(half), contents)["caption"] <= 0.6


def test_errors_of_colours_are_those_put_in():
    contents = sample_contents(60)
    clips = world.draw_clips(torch.tensor(contents), 7)
    real = judging.colour_errors(clips, contents)
    assert real["distance"] < 8 and abs(real["chroma"]) < 3  # the clips' own jitter
    grey = clips.mean(2, keepdim=True)
    saturated = judging.colour_errors((grey + 1.2 * (clips - grey)).clamp(0, 1), contents)
    faded = judging.colour_errors(grey + 0.8 * (clips - grey), contents)
    assert saturated["chroma"] > real["chroma"] + 5 and faded["chroma"] < real["chroma"] - 5
    assert min(saturated["distance"], faded["distance"]) > real["distance"] + 2


def test_known_contents_are_of_pretraining_and_varied():
    shown = {tuple(row) for row in world.training_contents().tolist()}
    chosen = world.known_contents(12)
    assert len(set(chosen)) == 12 and set(chosen) <= shown
    assert {row[0] for row in chosen} == set(world.known("shape"))
    assert {row[1] for row in chosen} == set(world.known("colour"))


def test_the_confusion_table_counts_every_clip():
    contents = sample_contents(20)
    table = judging.confusion(judging.judge(world.draw_clips(torch.tensor(contents), 7)), contents, "shape")
    counts = [int(cell) for line in table.splitlines()[1:] for cell in line.split()[1:] if cell != "."]
    assert sum(counts) == 20


# ---------------------------------------------------------------- model


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The folders that pretraining writes, after a step of each phase."""
    out = tmp_path_factory.mktemp("untrained")
    for phase in ("vae", "t2v", "i2v"):
        run_phase(out, phase, "--steps", "1")
    return out


def run_phase(out, phase, *flags):
    small = ["--batch_size", "1", "--bank", "2", "--num_clips", "1", "--num_reports", "1", "--log_seconds", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "STEPS", 1)
        pretrain.main(pretrain.parse_args([phase, "--out", str(out), *small, *flags]))


@pytest.mark.slow
def test_sizes(untrained):
    vae, transformer, text_encoder = networks.new_vae(), networks.new_transformer(), networks.new_text_encoder(512)
    assert networks.num_parameters(vae) < 1.1e6
    assert networks.num_parameters(transformer) < 2.5e6
    assert networks.num_parameters(text_encoder) < 0.25e6
    folders = [untrained / networks.TEXT_TO_VIDEO, untrained / networks.IMAGE_TO_VIDEO]
    own = [Path(top) / name for folder in folders for top, _, names in os.walk(folder) for name in names]
    assert sum(path.stat().st_size for path in own) < 12 * 2**20


@pytest.mark.slow
def test_plain_diffusers_loads_and_calls_it(untrained):
    """Without a dtype, with the pipelines' own text length, size and number of frames."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(untrained / networks.TEXT_TO_VIDEO)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("A red circle", num_inference_steps=1, output_type="pt").frames.shape == (1, 9, 3, 64, 64)
    tokens = [pipe.tokenizer(text).input_ids for text in ("a red star", "a pink ring", "")]
    assert len({tuple(ids) for ids in tokens}) == 3 and len(tokens[0]) == 4
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(untrained / networks.IMAGE_TO_VIDEO)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(torch.rand(1, 3, 64, 64), "A star", num_frames=9, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 64, 64)


@pytest.mark.slow
def test_the_scripts_take_it(untrained):
    """Both folders are whole for the training scripts, links followed, and the clips' size is one that they render."""
    from cogvideox.config import check_sample_size, check_task, read_config, text_length
    from cogvideox.folder import resolve_model_dir

    parts = ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"]
    for name, image_to_video in ((networks.TEXT_TO_VIDEO, False), (networks.IMAGE_TO_VIDEO, True)):
        config = read_config(resolve_model_dir(str(untrained / name), parts), "transformer")
        check_task(name, config, image_to_video)
        check_sample_size(config, (9, 64, 64))
        assert text_length(config) == networks.TEXT_LENGTH


@pytest.mark.slow
def test_captions_fit_the_text_length(untrained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(untrained / networks.TEXT_TO_VIDEO, subfolder="tokenizer")
    texts = [world.caption(row, wording) for row in sample_contents(50) for wording in range(world.NUM_WORDINGS)]
    assert max(map(len, tokenizer(texts).input_ids)) <= networks.TEXT_LENGTH


def test_an_image_to_video_transformer_starts_as_the_text_to_video_one():
    torch.manual_seed(0)
    transformer = networks.new_transformer()
    torch.nn.init.normal_(transformer.proj_out.weight)
    grown = networks.image_to_video_from(transformer)
    latents, text, time = torch.randn(1, 3, 16, 8, 8), torch.randn(1, 5, 64), torch.tensor([500])
    inputs = torch.cat([latents, torch.randn_like(latents)], dim=2)
    positions = pretrain.rotary_embeddings(transformer.config, latents)
    with torch.no_grad():
        both = [
            model(states, text, time, image_rotary_emb=positions).sample
            for model, states in ((transformer, latents), (grown, inputs))
        ]
    assert torch.equal(*both)


# ---------------------------------------------------------------- pretraining


def weights(out, phase):
    from safetensors.torch import load_file

    return load_file(out / f"state_{phase}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["vae", "t2v", "i2v"])
def test_a_stopped_phase_goes_on_as_if_it_had_not(untrained, tmp_path, monkeypatch, phase):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out in (whole, stopped):
        out.mkdir()
        if phase != "vae":
            for name in (networks.TEXT_TO_VIDEO, networks.IMAGE_TO_VIDEO):
                subprocess.run(["cp", "-a", untrained / name, out / name], check=True)
    monkeypatch.setattr(pretrain, "learning_rate_share", lambda *given: 1.0)  # which follows --steps
    run_phase(whole, phase, "--steps", "2")
    run_phase(stopped, phase, "--steps", "1")
    run_phase(stopped, phase, "--steps", "2")
    first, second = weights(whole, phase), weights(stopped, phase)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-6), name
    lines = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert [line["from_step"] for line in lines if "from_step" in line] == [0, 1]


@pytest.mark.slow
def test_reconstruction_is_learned():
    """Of one clip: its loss falls by a quarter in ten steps."""
    torch.manual_seed(0)
    recipe = pretrain.RECIPES["vae"]._replace(learning_rate=4e-3)
    learner = pretrain.Learner({"vae": networks.new_vae()}, recipe, "cpu")
    losses = []
    for _ in range(10):
        loss = pretrain.vae_loss(learner.modules["vae"], 1, seed=0, device="cpu", step=0)
        learner.update(loss, rate=1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], losses


def test_the_learning_rate_rises_and_falls():
    shares = [pretrain.learning_rate_share(step, step / 100, warmup_steps=10) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == max(shares[8:11])
    assert shares[100] == pytest.approx(pretrain.MIN_RATE) and shares[99] > shares[100]
    assert all(map(math.isfinite, shares))


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.slow
def test_before_and_after_are_shown_and_measured(untrained, tmp_path, capsys):
    """An adapter with weights of its own on the text-to-video model: measured twice, drawn, and refused if it learned less."""
    from PIL import Image

    import compare
    from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
    from engine.lora import save_lora
    from test_lora import trained_transformer

    model, out = untrained / networks.TEXT_TO_VIDEO, tmp_path / "out"
    save_lora(trained_transformer(model), tmp_path / "lora", TEXT_TO_VIDEO_PIPELINE)
    given = ["--model", model, "--lora", tmp_path / "lora", "--concept", "star", "--out", out]
    given = [*map(str, given), "--num_clips", "2", "--num_shown", "2", "--steps", "1"]
    compare.main(given)
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers.keys() == {"star before", "star after", "known before", "known after"}
    with Image.open(out / "contact_sheet.webp") as sheet:
        assert (sheet.format, sheet.size) == ("WEBP", (830, 200))  # one frame: this model draws nothing that moves
    assert read_clip(out / "before_and_after.mp4").shape == (9, 3, 2 * 64, 2 * 64)
    with pytest.raises(SystemExit, match="0% of the captions of star are obeyed, and 50% were expected"):
        compare.main([*given, "--at_least", "0.5"])


def some_rows(count, missed=()):
    """Rows of drawn clips of which only `missed` are not obeyed after training."""
    clips = world.draw_clips(torch.tensor(sample_contents(2 * count)), 0)
    wrong = [(["colour"], ["colour", "shape"] if number in missed else []) for number in range(count)]
    return [
        contact_sheet.Row(f"caption {number}", (clips[number], clips[count + number]), wrong[number])
        for number in range(count)
    ]


def clip_at(frames, place):
    """The clip [F', 3, 64, 64] that a sheet's frames show at (left, top)."""
    box = (*place, place[0] + contact_sheet.CLIP, place[1] + contact_sheet.CLIP)
    pixels = [np.asarray(frame.crop(box).resize((64, 64), 0)) for frame in frames]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def test_the_sheet_shows_every_row_and_those_that_are_missed_last():
    rows = some_rows(5, missed=(0, 3))
    frames = contact_sheet.draw_sheet("title", rows)
    places = contact_sheet.places_of(5)
    for number, (left, top) in zip((1, 2, 4, 0, 3), places, strict=True):
        for side in (0, 1):
            shown = clip_at(frames, (left + side * (contact_sheet.CLIP + contact_sheet.GAP), top))
            assert torch.allclose(shown, rows[number].clips[side], atol=0.5 / 255 + 1e-6), (number, side)
        edge = frames[0].getpixel((left + contact_sheet.CLIP + contact_sheet.GAP, top - 1))
        assert edge == (contact_sheet.MISSED if number in (0, 3) else contact_sheet.OBEYED)


def test_nothing_on_the_sheet_overlaps_however_long_the_caption():
    """The text of a row ends above the next row's, and within the page."""
    longest = max((world.caption(row, 4) for row in EVERYTHING), key=len)
    wrong = (["shape", "colour", "direction"], ["shape", "colour", "direction"])
    row = some_rows(1)[0]._replace(caption=longest, wrong=wrong)
    page = contact_sheet.draw_page("title", [row], [(contact_sheet.GAP, contact_sheet.HEADER)])
    text = page.crop((contact_sheet.GAP + 2 * (contact_sheet.CLIP + contact_sheet.GAP), 0, *page.size))
    ink = np.asarray(text)[contact_sheet.HEADER :].min(axis=2) < 200
    assert ink[: contact_sheet.CLIP].any() and not ink[contact_sheet.CLIP :].any()
    assert not ink[:, contact_sheet.TEXT_WIDTH :].any()


def test_the_sheet_moves_and_is_small(tmp_path):
    from PIL import Image

    path = tmp_path / "sheet.webp"
    contact_sheet.save_sheet(contact_sheet.draw_sheet("title", some_rows(12)), path)
    for sheet_path in (path, ROOT / "assets/contact_sheet.webp"):
        with Image.open(sheet_path) as sheet:
            assert (sheet.size, sheet.n_frames, sheet.info["loop"]) == ((830, 880), 9, 0)
        assert sheet_path.stat().st_size < 1_000_000


def test_clips_that_obey_their_captions_are_marked_so():
    import compare

    contents = sample_contents(12)
    clips = world.draw_clips(torch.tensor(contents), 0)
    others = {"colour": "red", "shape": "circle", "direction": "left"}
    for name, word in others.items():
        column, index = world.NAMES.index(name), world.ATTRIBUTES[name].index(word)
        changed = [(*row[:column], index, *row[column + 1 :]) for row in contents]
        moved = world.draw_clips(torch.tensor(changed), 0)
        verdicts = [judging.judge(moved), judging.judge(clips)]
        rows = compare.rows_of(contents, [moved, clips], verdicts)
        expected = [[name] if row[column] != index else [] for row in contents]
        assert [row.wrong for row in rows] == [(wrong, []) for wrong in expected]
        count = sum(not wrong for wrong in expected)
        assert compare.title_of("pink", rows).endswith(f"{count} of 12 obeyed before training, 12 of 12 after")


def test_a_clip_that_shows_nothing_obeys_nothing():
    contents = sample_contents(1)
    empty = world.draw_clips(torch.tensor(contents), 0)[:, :, :, :, :1].expand(-1, -1, -1, -1, 64)
    assert judging.mistakes(judging.judge(empty)[0], contents[0]) == list(world.MEASURED)


def test_the_video_puts_clips_where_they_belong(tmp_path):
    import compare

    clips = world.draw_clips(torch.tensor(sample_contents(6)), 0)
    before, after = clips[:3], clips[3:]
    compare.write_video(tmp_path / "both.mp4", before, after)
    video = read_clip(tmp_path / "both.mp4")  # [F', 3, 2h, 3w]
    assert measure.psnr(video[None, :, :, :64, 128:], before[None, 2]) > 25
    assert measure.psnr(video[None, :, :, 64:, :64], after[None, 0]) > 25


@pytest.mark.slow  # teach.sh starts five programs
@pytest.mark.parametrize("method", ["lora", "sft"])
def test_teaching_goes_through_the_wrappers(untrained, tmp_path, method):
    settings = {
        "MODEL": untrained / networks.TEXT_TO_VIDEO, "OUT": tmp_path / "out", "METHOD": method, "STEPS": 2,
        "NUM_CLIPS": 3, "MEASURED_CLIPS": 1, "BATCH_SIZE": 1,
    }  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run([ROOT / "tiny_model/teach.sh", "pink"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {"clips", "prepared", "contact_sheet.webp", "before_and_after.mp4", "numbers.json", "loss.png"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow  # the wrapper, as a row is measured
def test_a_row_of_recipes_is_trained_by_the_wrapper_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "MEASURED_AT", (2, 4))
    monkeypatch.setattr(recipes, "SAMPLING_STEPS", 4)
    monkeypatch.setattr(recipes, "LEARNED", 0.0)  # reached at the first look
    given = ["--model", str(SHIPPED), "--out", str(tmp_path), "--csv", str(tmp_path / "r.csv"), "--num_clips", "2"]
    args, row = recipes.parse_args(given), recipes.grid()[-1]
    found = recipes.measure_row(args, recipes.prepare(args), row)
    assert list(found) == [*recipes.GRID, *recipes.RESULTS] and row.items() <= found.items()
    assert found["steps_to_70"] == 2 and 0 < found["seconds_to_70"] < 60
    assert 0 <= found["known"] <= 1 and found["colour_distance"] > 0
    config = json.loads(next(tmp_path.glob("3e-3_*/*/args.json")).read_text())["flags"]
    assert (config["rank"], config["learning_rate"], config["stratified_timesteps"]) == (64, 3e-3, True)


def test_rows_of_recipes_are_kept_in_the_order_of_the_grid(tmp_path):
    rows = [row | dict.fromkeys(recipes.RESULTS, "0.5") for row in recipes.grid()]
    recipes.write_rows(tmp_path / "r.csv", [rows[5], rows[0], rows[20]])
    assert recipes.rows_of(tmp_path / "r.csv") == [rows[0], rows[5], rows[20]]


def test_the_recipes_of_the_repository_are_those_of_the_grid():
    rows = recipes.rows_of(ROOT / "tiny_model/recipes.csv")
    assert [{name: row[name] for name in recipes.GRID} for row in rows] == recipes.grid()


# ---------------------------------------------------------------- the model that is shipped

SHIPPED, SHIPPED_I2V = ROOT / "assets" / networks.TEXT_TO_VIDEO, ROOT / "assets" / networks.IMAGE_TO_VIDEO


def load(pipeline_class, folder):
    pipe = pipeline_class.from_pretrained(folder, dtype=torch.float32)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def test_what_is_shipped_is_small_and_fp16():
    """Only the text encoder is fp32: transformers would keep fp16 beside parts that diffusers makes fp32."""
    from safetensors import safe_open

    own = [
        Path(top) / name for folder in (SHIPPED, SHIPPED_I2V) for top, _, names in os.walk(folder) for name in names
    ]
    assert sum(path.stat().st_size for path in own) < 12 * 2**20
    weights = [path for path in own if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, framework="pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert dtypes == {"F32" if path.parent.name == "text_encoder" else "F16"}, path


@pytest.mark.slow
def test_the_shipped_model_draws_what_captions_say():
    """A handful of the captions that the slow test has a hundred of; loaded and called as the README does."""
    from diffusers import CogVideoXPipeline

    pipe, contents = CogVideoXPipeline.from_pretrained(SHIPPED), world.test_contents(8)
    assert measure.measure_vae(pipe.vae, contents)["psnr"] >= 28
    options = {"num_inference_steps": 10, "max_sequence_length": networks.TEXT_LENGTH}
    verdicts = judging.judge(measure.sample(pipe, measure.captions_of(contents), **options))
    assert judging.accuracy(verdicts, contents)["caption"] >= 6 / 8


@pytest.mark.slow
def test_the_shipped_image_to_video_model_goes_on_from_a_frame():
    from diffusers import CogVideoXImageToVideoPipeline

    pipe = CogVideoXImageToVideoPipeline.from_pretrained(SHIPPED_I2V)
    options = {"num_inference_steps": 10, "max_sequence_length": networks.TEXT_LENGTH}
    scores = measure.measure_image_to_video(pipe, world.test_contents(4), **options)
    assert scores["psnr_of_first_frame"] >= 25 and scores["direction"] >= 3 / 4


@pytest.mark.slow
@pytest.mark.parametrize("text_length", [networks.TEXT_LENGTH, networks.LONG_TEXT_LENGTH])
def test_caption_accuracy_of_the_shipped_model(text_length):
    from diffusers import CogVideoXPipeline

    contents = world.test_contents()
    clips = measure.sample(
        load(CogVideoXPipeline, SHIPPED), measure.captions_of(contents), batch_size=10, max_sequence_length=text_length
    )
    verdicts = judging.judge(clips)
    for name in world.MEASURED:
        print(f"\n{judging.confusion(verdicts, contents, name)}")
    assert judging.accuracy(verdicts, contents)["caption"] >= 0.85


@pytest.mark.slow
def test_image_to_video_of_the_shipped_model():
    from diffusers import CogVideoXImageToVideoPipeline

    pipe = load(CogVideoXImageToVideoPipeline, SHIPPED_I2V)
    scores = measure.measure_image_to_video(pipe, world.test_contents(40), max_sequence_length=networks.TEXT_LENGTH)
    assert scores["psnr_of_first_frame"] >= 20 and scores["direction"] >= 0.8


@pytest.mark.slow  # scripts of their own, which import torch before they read
@pytest.mark.parametrize("script", ["measure.py", "compare.py"])
def test_a_folder_without_a_model_is_one_line(script, tmp_path):
    more = ["--concept", "star", "--lora", "l", "--out", str(tmp_path)] if script == "compare.py" else []
    command = [sys.executable, str(ROOT / "tiny_model" / script), "--model", str(tmp_path / "none"), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "none: no pipeline is in it; tiny_model/pretrain.py writes one" in line
