"""The walk through the VAE's weights in slabs computes what the stock VAE does on whole frames."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from base.errors import MemoryFullError
from cogvideox import encoding, vae_kernels, vae_memory, vae_plain
from cogvideox import vae as vae_walk
from cogvideox.config import IMAGE_TO_VIDEO_PIPELINE, TEXT_TO_VIDEO_PIPELINE, load_scheduler
from cogvideox.loading import load_transformer, load_vae
from cogvideox.pipeline import make_pipeline


BLOCKS = 4
TINY = {
    "block_out_channels": (8, 16, 16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("CogVideoXDownBlock3D",) * BLOCKS,
    "up_block_types": ("CogVideoXUpBlock3D",) * BLOCKS,
}


def make_vae(**more):
    """A tiny VAE whose norms and biases are random too: what is left out shows."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**{**TINY, **more}).eval().requires_grad_(False)
    for name, param in vae.named_parameters():
        if param.ndim == 1:
            torch.nn.init.normal_(param, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return vae


def error(result, exact):
    """Root mean square, in standard deviations of `exact`; no value is off by more than five times the bound of 1e-5."""
    assert result.shape == exact.shape
    deviations = (result - exact) / exact.std()
    assert exact.dtype != torch.float32 or deviations.abs().max() < 5e-5
    return float(deviations.square().mean().sqrt())


def slabs(monkeypatch, number):
    def cut(height, width, *sizes):
        edges = sorted({i * height // number for i in range(number + 1)})
        return list(zip(edges, edges[1:], strict=False))

    monkeypatch.setattr(vae_walk, "slabs_of", cut)


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@torch.no_grad()
def encode_error(vae, frames, height, width, batch=1):
    pixels = torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return error(vae_walk.encode(vae, pixels), vae.encode(pixels).latent_dist.parameters)


@torch.no_grad()
def decode_error(vae, frames, height, width, batch=1):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, vae.config.latent_channels, frames, height, width, generator=generator)
    return error(vae_walk.decode(vae, latents), vae.decode(latents).sample)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_slabs_are_the_stock_function(vae, monkeypatch, number):
    slabs(monkeypatch, number)
    assert encode_error(vae, 17, 48, 40) < 1e-5
    assert decode_error(vae, 5, 6, 5) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 5, 7, 8, 9, 11, 12, 13, 16, 17, 24, 25, 33, 48, 49])
def test_any_number_of_frames(vae, monkeypatch, frames):
    slabs(monkeypatch, 2)
    assert encode_error(vae, frames, 16, 24) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 12, 13])
def test_any_number_of_latent_frames(vae, monkeypatch, frames):
    slabs(monkeypatch, 2)
    assert decode_error(vae, frames, 2, 3) < 1e-5


@pytest.mark.parametrize("size", [(41, 51), (45, 90), (16, 17), (15, 8), (31, 24)])
def test_odd_sizes(vae, monkeypatch, size):
    slabs(monkeypatch, 3)
    assert encode_error(vae, 9, *size) < 1e-5
    assert decode_error(vae, 3, size[0] // 8, size[1] // 8) < 1e-5


def test_a_batch_of_videos(vae):
    assert encode_error(vae, 9, 16, 16, batch=3) < 1e-5
    assert decode_error(vae, 3, 2, 2, batch=3) < 1e-5


def test_other_batches_of_frames(monkeypatch):
    vae = make_vae()
    vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 4, 1
    assert encode_error(vae, 13, 16, 16) < 1e-5  # one frame a pass at the latents' size
    assert decode_error(vae, 4, 2, 2) < 1e-5


@pytest.mark.parametrize("channels", [(32, 8, 16, 8), (8, 32, 8, 16), (16, 8, 8, 32)])
def test_channels_that_grow_and_shrink(monkeypatch, channels):
    """A block's output takes the place of its input, at either end of the room."""
    slabs(monkeypatch, 2)
    vae = make_vae(block_out_channels=channels)
    assert encode_error(vae, 9, 16, 24) < 1e-5
    assert decode_error(vae, 3, 2, 3) < 1e-5


def test_slabs_are_cut_by_a_video_s_frames_and_size_alone(vae, monkeypatch):
    """An image's are higher; those of a video are the same in all of its passes, or kept frames would not fit."""
    monkeypatch.setattr(vae_walk, "SLAB_VALUES", 16 * 24 * 16 // 4)
    assert encode_error(vae, 1, 16, 24) < 1e-5 and decode_error(vae, 1, 2, 3) < 1e-5
    assert encode_error(vae, 25, 16, 24) < 1e-5 and decode_error(vae, 7, 2, 3) < 1e-5
    assert len(vae_walk.slabs_of(16, 24, 16, vae_walk.slab_values(9))) == 4
    assert len(vae_walk.slabs_of(16, 24, 16, vae_walk.slab_values(1))) == 1


def test_kept_frames_stay_on_a_gpu_with_plenty_of_room(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
    for free, left in ((79, 39), (9, 4), (1, 0)):
        monkeypatch.setattr(vae_memory, "free_gpu_bytes", lambda device, free=free: free * 2**30)
        assert vae_memory.bytes_left(cuda) == left * 2**30


def test_room_too_small_grows(vae, monkeypatch):
    def small(like, *sizes):
        return vae_memory.Room(like, 1, 1)

    exact = make_outputs(vae)
    monkeypatch.setattr(vae_walk, "make_room", small)
    assert all(torch.equal(*pair) for pair in zip(make_outputs(vae), exact, strict=True))


def test_room_of_a_pass_is_made_once(vae, monkeypatch):
    """All activations of the real VAE's channels fit into what is asked for before the first."""
    rooms = []

    class Room(vae_memory.Room):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            rooms.append((self, self.values, self.slabs))

    monkeypatch.setattr(vae_walk, "Room", Room)
    make_outputs(make_vae(block_out_channels=(8, 16, 16, 32)))
    assert len(rooms) == 2
    assert all(room.values is values and room.slabs is slab for room, values, slab in rooms)


def make_outputs(vae, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 25, 32, 48, generator=generator) * 2 - 1
    latents = torch.randn(1, vae.config.latent_channels, 7, 4, 6, generator=generator)
    return vae_walk.encode(vae, pixels.to(device, dtype)), vae_walk.decode(vae, latents.to(device, dtype))


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kept_frames_on_the_host_change_no_bit(monkeypatch, device, share):
    slabs(monkeypatch, 3)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    vae = make_vae(block_out_channels=(32, 32, 32, 64)).to(device, dtype)
    exact = make_outputs(vae, device, dtype)
    on_host, store = set(), vae_memory.HostFrames.store
    monkeypatch.setattr(vae_memory.HostFrames, "store", lambda frames, key: (on_host.add(key), store(frames, key)))
    monkeypatch.setattr(vae_memory, "bytes_left", lambda device: share * 2**20)
    for _ in range(2):  # the second video finds the memory of the first
        assert all(torch.equal(*pair) for pair in zip(make_outputs(vae, device, dtype), exact, strict=True))
    kinds = {isinstance(layer, type(vae.encoder.conv_in)) for layer, _ in on_host}
    assert kinds == {True} and len(on_host) > len(vae_memory.PAGES[vae]) > 15  # encoder and decoder share memory


def test_host_memory_does_not_grow_with_every_size(monkeypatch):
    slabs(monkeypatch, 3)
    vae = make_vae(block_out_channels=(32, 32, 32, 64))
    monkeypatch.setattr(vae_memory, "bytes_left", lambda device: 0)
    taken = []
    for height, width in ((48, 64), (64, 48), (32, 32), (48, 48), (48, 64)):
        vae_walk.encode(vae, torch.rand(1, 3, 17, height, width))
        taken.append(sum(page.nbytes for page in vae_memory.PAGES[vae]))
    assert taken[0] > 0 and taken[-1] < 1.5 * taken[0]


def test_where_the_host_has_no_memory_to_pin_frames_stay_on_the_gpu(monkeypatch, caplog):
    slabs(monkeypatch, 3)
    vae = make_vae(block_out_channels=(32, 32, 32, 64))
    exact = make_outputs(vae)

    def refuse(num_bytes, device):
        raise MemoryFullError("host memory cannot be page-locked")

    monkeypatch.setattr(vae_memory, "bytes_left", lambda device: 0)
    monkeypatch.setattr(vae_memory, "pinned_memory", refuse)
    assert all(torch.equal(*pair) for pair in zip(make_outputs(vae), exact, strict=True))
    assert len(caplog.records) == 2  # one a video


@pytest.mark.parametrize("can_compile", [True, False])
def test_kernels_are_used_only_where_triton_can_compile(can_compile, monkeypatch):
    """A slim container has no C compiler: plain torch then computes the same."""
    monkeypatch.setattr(vae_kernels, "triton", object())
    monkeypatch.setattr(vae_kernels, "uses_triton", lambda device: can_compile)
    vae = make_vae(block_out_channels=(32, 32, 32, 64))
    assert vae_walk.steps_for(vae) is (vae_kernels if can_compile else vae_plain)


# ---------------------------------------------------------------- where it is used


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device on which the walk is used."""
    monkeypatch.setattr(vae_walk, "is_used_on", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


def bound(device):
    """Of `error`; on a GPU two shapes may take two algorithms."""
    return 1e-5 if device.type == "cpu" else 3e-5


@pytest.fixture
def walks(monkeypatch):
    """Videos that went through our encoder and decoder, one by one."""
    passed = []
    for step in ("encode", "decode"):
        stock = getattr(vae_walk.Walk, step)
        monkeypatch.setattr(
            vae_walk.Walk, step, lambda walk, *inputs, stock=stock: (passed.append(walk), stock(walk, *inputs))[1]
        )
    return passed


@torch.no_grad()
def test_videos_and_first_frames_are_encoded_as_by_the_stock_module(device, walks):
    vae = make_vae().to(device)
    generator = torch.Generator().manual_seed(3)
    pixels = (torch.rand(2, 9, 3, 32, 48, generator=generator) * 2 - 1).to(device)
    stock = vae.encode(pixels.permute(0, 2, 1, 3, 4)).latent_dist.parameters
    assert error(encoding.encode_videos(vae, pixels), stock) < bound(device)
    noise = torch.randn(3, 3, 32, 48, generator=generator).to(device)
    log_sigma = torch.tensor([-3.0, -2.0, -1.0], device=device)
    frames = pixels[0, :1].expand(3, -1, -1, -1)
    noisy = frames + noise * log_sigma.exp().view(-1, 1, 1, 1)
    variants = encoding.encode_noised_images(vae, frames, noise, log_sigma)
    assert error(variants, vae.encode(noisy[:, :, None]).latent_dist.parameters) < bound(device)
    for k, variant in enumerate(variants):  # to the bit: a folder does not depend on how many are drawn
        alone = encoding.encode_noised_images(vae, frames[k : k + 1], noise[k : k + 1], log_sigma[k : k + 1])
        assert torch.equal(alone[0], variant)
    assert len(walks) == 2 + 3 + 3  # 9 frames are one pass


@pytest.mark.parametrize("kind", ["5b", "1.5-5b-i2v"])
@torch.no_grad()
def test_a_pipeline_decodes_as_the_stock_one(kind, tiny, device, walks):
    folder = tiny(kind)
    vae, transformer = load_vae(folder, torch.float32).to(device), load_transformer(folder, torch.float32).to(device)
    model = TEXT_TO_VIDEO_PIPELINE if kind == "5b" else IMAGE_TO_VIDEO_PIPELINE
    pipe = make_pipeline(SimpleNamespace(pipeline_class=model), vae, load_scheduler(folder), "pipeline", transformer)
    latents = torch.randn(1, 3, vae.config.latent_channels, 4, 6, device=device)
    stock = type(pipe).decode_latents(pipe, latents)
    assert not walks
    assert error(pipe.decode_latents(latents), stock) < bound(device) and walks


def test_tiles_are_the_stock_modules(device, walks):
    vae = make_vae(sample_height=128, sample_width=128).to(device)
    vae.enable_tiling()
    pixels = torch.rand(1, 1, 3, 128, 128, device=device) * 2 - 1
    encoding.encode_videos(vae, pixels)
    assert not walks


def relative(result, exact):
    return float((result.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 3])
def test_bf16_is_as_near_to_fp32_as_the_stock_module(monkeypatch, number):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    slabs(monkeypatch, number)
    vae = make_vae(block_out_channels=(32, 64, 64, 128), latent_channels=16).to("cuda", torch.bfloat16)
    pixels = torch.rand(1, 3, 17, 96, 160, device="cuda", dtype=torch.bfloat16) * 2 - 1
    latents = torch.randn(1, 16, 5, 12, 20, device="cuda", dtype=torch.bfloat16)
    ours = vae_walk.encode(vae, pixels), vae_walk.decode(vae, latents)
    with torch.no_grad():
        stock = vae.encode(pixels).latent_dist.parameters, vae.decode(latents).sample
        exact = vae.float().encode(pixels.float()).latent_dist.parameters, vae.decode(latents.float()).sample
    for result, usual, truth in zip(ours, stock, exact, strict=True):
        assert relative(result, truth) <= relative(usual, truth)
    assert relative(vae_walk.encode(vae, pixels.float()), exact[0]) < 1e-5
    assert relative(vae_walk.decode(vae, latents.float()), exact[1]) < 1e-5
