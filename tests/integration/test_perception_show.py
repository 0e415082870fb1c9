"""`vipo map`: what it reads, what it refuses, what it writes."""

import json
import os
import struct
import tracemalloc
import zlib
from typing import get_args

import numpy as np
import pytest
import torch
from films import moving, write_film
from PIL import Image

from vipo.config.perception import PerceptionConfig
from vipo.demo.scenes import draw, sample_scene
from vipo.maps import pictures, show
from vipo.maps.pictures import find_pictures, read_clip, read_image
from vipo.maps.show import map_images
from vipo.maps.veil import DIMMING, contours, dimmed, entropy, levels, strength, top_share, veil
from vipo.perception import PerceptionError
from vipo.perception.orientation import Orientation

pytest_plugins = ["command"]


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "in" / "scene.png"
    path.parent.mkdir()
    pixels = draw(sample_scene(np.random.default_rng(5))).transpose(1, 2, 0)
    Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Bad input must be refused before a model is loaded."""

    def refuse(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(show, "load_backbone", refuse)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gradient(height=6, width=9):
    return np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)


def test_every_mode_is_read(tmp_path):
    colour = gradient()
    expected = torch.from_numpy(colour.copy()).permute(2, 0, 1) / 255
    Image.fromarray(colour).save(tmp_path / "rgb.png")
    assert torch.allclose(read_image(tmp_path / "rgb.png"), expected)

    grey = colour[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.allclose(read_image(tmp_path / "grey.png"), expected[:1].expand(3, -1, -1))

    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert torch.allclose(read_image(tmp_path / "deep.png"), expected[:1].expand(3, -1, -1), atol=1e-6)

    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    assert torch.allclose(read_image(tmp_path / "float.tiff"), expected[:1].expand(3, -1, -1), atol=1e-6)

    alpha = np.full(grey.shape, 255, np.uint8)
    alpha[0, 0] = 0
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "alpha.png")
    seen = read_image(tmp_path / "alpha.png")
    assert seen[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    assert torch.allclose(seen[:, 1:], expected[:, 1:])

    Image.fromarray(colour).convert("P").save(tmp_path / "palette.gif")
    assert read_image(tmp_path / "palette.gif").shape == expected.shape
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").shape == expected.shape


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.rot90(gradient(), -1).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(read_image(tmp_path / "turned.png"), expected)


def test_what_the_map_leaves_out_is_dimmed_and_nothing_is_tinted():
    heat = torch.zeros(4, 6)
    heat[:, 3:] = 1.0
    image = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1))
    shown = dimmed(image, heat)
    assert torch.allclose(shown[:, :, -4:], image[:, :, -4:], atol=1e-5)
    assert torch.allclose(shown[:, :, :4], (1 - DIMMING) * image[:, :, :4], atol=1e-5)
    assert torch.allclose(dimmed(image, 3 * heat), shown, atol=1e-6)
    assert torch.equal(dimmed(image, torch.ones(4, 6)), image)
    with pytest.raises(ValueError, match="image, heat"):
        dimmed(image[None], heat)
    laid = np.asarray(veil(heat, (16, 24)))
    assert laid[8, 1].tolist() == [0, 0, 0, round(255 * DIMMING)]
    assert laid[8, -1, 3] == 0


def test_figures_of_a_map_are_those_of_its_definition():
    uniform = torch.ones(5, 8)
    assert entropy(uniform) == pytest.approx(1.0)
    assert top_share(uniform) == pytest.approx(0.1)
    assert contours(uniform, (50, 80)) == [[], []]
    one = torch.zeros(5, 8)
    one[2, 3] = 1.0
    assert entropy(one) == pytest.approx(0.0)
    assert top_share(one) == pytest.approx(1.0)
    heat = torch.rand(9, 10, generator=torch.Generator().manual_seed(2)).square()
    weights = sorted((float(value) for value in heat.flatten()), reverse=True)
    shares = [value / sum(weights) for value in weights]
    assert entropy(heat) == pytest.approx(-sum(p * np.log(p) for p in shares) / np.log(90))
    assert top_share(heat) == pytest.approx(sum(shares[:9]))
    half, tenth = levels(heat)
    assert sum(value for value in weights if value >= half) >= sum(weights) / 2
    assert sum(value for value in weights if value > half) < sum(weights) / 2
    assert sum(value >= tenth for value in weights) == 9


def test_lines_run_where_the_map_has_their_level():
    ys, xs = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    heat = torch.exp(-((ys - 11.5) ** 2 + (xs - 11.5) ** 2) / 40)
    surface = strength(heat, (96, 96))
    outer, inner = contours(heat, (96, 96))
    for lines, level in zip((outer, inner), levels(heat), strict=True):
        assert len(lines) == 1
        for x, y in lines[0]:
            assert abs(float(surface[round(float(y)), round(float(x))]) - level) < 0.05
    assert np.ptp(outer[0][:, 0]) > np.ptp(inner[0][:, 0])


def test_one_picture_to_a_file(scene, tmp_path):
    target = tmp_path / "deep" / "map.png"
    assert map_images([scene], target, [PerceptionConfig()]) == [target]
    with Image.open(target) as figure:
        pixels = np.asarray(figure.convert("RGB")).astype(int)
    # Two by two, each of at least 600 pixels.
    assert min(pixels.shape[:2]) > 1200
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean() > 0.1
    first = target.read_bytes()
    map_images([scene], target, [PerceptionConfig()])
    assert target.read_bytes() == first
    assert [path.name for path in target.parent.iterdir()] == ["map.png"]


@pytest.mark.parametrize("style", ["overlay", "contour"])
def test_a_style_is_the_picture_alone(scene, tmp_path, vipo, style):
    done = vipo("map", scene, "-o", tmp_path / "map.png", "--style", style)
    assert done.code == 0, done.err
    with Image.open(tmp_path / "map.png") as shown, Image.open(scene) as picture:
        assert shown.size == (640, 640)
        apart = np.abs(np.asarray(shown).astype(int) - np.asarray(picture.resize((640, 640), 0)).astype(int)).max(
            axis=2
        )
    # Lines are a few per cent; what is dimmed is most of the picture.
    assert (apart > 8).mean() < 0.15 if style == "contour" else (apart > 8).mean() > 0.4


def test_the_figure_says_what_its_orientation_rests_on(scene, tmp_path, monkeypatch):
    notes = []
    drawn = show._note
    monkeypatch.setattr(show, "_note", lambda mapped: notes.append(drawn(mapped)) or notes[-1])
    for configs in (
        [PerceptionConfig()],
        [PerceptionConfig(input_size=96, layer=1)],
        [PerceptionConfig(), PerceptionConfig(orientation="skew")],
    ):
        map_images([scene], tmp_path / "map.png", configs)
    assert "\norientation: measured: AUC .967" in notes[0]
    assert notes[1].endswith("\norientation: not measured here")
    assert "\n" not in notes[2]


def test_several_pictures_to_a_folder(scene, tmp_path):
    tall = tmp_path / "in" / "tall $x_y$.jpg"
    Image.fromarray(gradient(90, 40)).save(tall)
    flat = tmp_path / "in" / "flat.png"
    Image.new("L", (30, 30), 128).save(flat)
    written = map_images([scene, tall, flat], tmp_path / "out", [PerceptionConfig()])
    assert [path.name for path in written] == ["scene.png", "tall $x_y$.png", "flat.png"]
    for path in written:
        with Image.open(path) as figure:
            figure.verify()


@pytest.mark.usefixtures("no_model")
def test_bad_input_is_refused_before_a_model_is_loaded(scene, tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(scene.read_bytes()[:100])
    strip = tmp_path / "strip.png"
    Image.new("RGB", (900, 10)).save(strip)
    wild = tmp_path / "wild.tiff"
    Image.fromarray(np.full((4, 4), 7.5, np.float32)).save(wild)
    twin = tmp_path / "scene.jpg"
    Image.new("RGB", (9, 9)).save(twin)
    film = tmp_path / "film.mp4"
    film.write_text("#EXTM3U\nfile:///etc/hostname")
    taken = tmp_path / "taken.jpg"
    taken.touch()
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    endless = tmp_path / "endless.png"
    endless.symlink_to("/dev/zero")
    # Only its header says so: nothing of it is decoded.
    large = tmp_path / "large.png"
    large.write_bytes(png_header(12_000, 12_000))
    for paths, output, message in (
        ([tmp_path / "absent.png"], tmp_path / "o.png", r"absent\.png: no such file"),
        ([tmp_path], tmp_path / "o.png", r"no picture or film in this folder|one file cannot take"),
        ([film], tmp_path / "o.png", r"film\.mp4: cannot be read as a picture"),
        ([scene, text], tmp_path / "o", r"notes\.png: cannot be read as a picture"),
        ([cut], tmp_path / "o.png", r"cut\.png: cannot be read as a picture"),
        ([strip], tmp_path / "o.png", r"strip\.png: 900x10 pixels"),
        ([wild], tmp_path / "o.png", "values from 7.5 to 7.5 in mode F"),
        ([scene, twin], tmp_path / "o", r"would both become"),
        ([scene], scene, "would overwrite a picture"),
        ([scene, twin], tmp_path / "o.png", "one file cannot take 2 maps"),
        ([scene], taken, r"taken\.jpg: is a file that does not end in \.png"),
        ([scene], taken / "below", "cannot be made"),
        ([], tmp_path / "o.png", "no picture given"),
        ([pipe], tmp_path / "o.png", r"pipe\.mp4: cannot be read .*it is a pipe, a regular file is needed"),
        ([endless], tmp_path / "o.png", r"endless\.png: cannot be read .*it is a device"),
        ([large], tmp_path / "o.png", r"large\.png: cannot be read .*12000x12000 pixels, at most 33554432"),
        ([tmp_path / "a\0b.png"], tmp_path / "o.png", "NUL character"),
    ):
        with pytest.raises(PerceptionError, match=message):
            map_images(paths, output, [PerceptionConfig()])
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "o.png").exists()


def test_a_film_of_large_frames_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_film(tmp_path / "film.mp4", moving())
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 48 * 64 - 1)
    with pytest.raises(PerceptionError, match=r"film\.mp4: cannot be read .*64x48 pixels, at most 3071"):
        read_clip(tmp_path / "film.mp4")


def test_an_animation_of_many_frames_is_refused(tmp_path, monkeypatch):
    write_film(tmp_path / "film.mp4", moving())
    monkeypatch.setattr(pictures, "_MOST_FRAMES", 3)
    with pytest.raises(PerceptionError, match=r"film\.mp4: more than 3 frames"):
        read_clip(tmp_path / "film.mp4")


def test_a_picture_of_the_largest_size_takes_less_than_a_gigabyte(tmp_path):
    """Traced by NumPy's and Pillow's own counts: the picture, its colours in float32, and one copy of them."""
    Image.new("RGB", (4096, 2048)).save(tmp_path / "picture.png", compress_level=1)
    tracemalloc.start()
    read_image(tmp_path / "picture.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak * 4 < 2**30


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png", "clip.mp4"])
def test_clips_are_read_frame_by_frame(tmp_path, name):
    frames, path = moving(), tmp_path / name
    if name.endswith("mp4"):
        write_film(path, frames)
    else:
        pages = [Image.fromarray(frame) for frame in frames]
        pages[0].save(path, save_all=True, append_images=pages[1:], duration=125, lossless=True)
    clip = read_clip(path)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    assert clip.frames.shape == expected.shape
    assert (clip.frames - expected).abs().mean() < 0.03
    assert clip.milliseconds == pytest.approx((125.0,) * 4, abs=6)
    assert torch.equal(read_image(path), clip.frames[0])


def test_pages_of_a_tiff_are_no_clip(tmp_path):
    pages = [Image.fromarray(frame) for frame in moving()]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    assert read_clip(tmp_path / "pages.tiff").frames.shape[0] == 1


def test_folders_are_searched(tmp_path):
    for name in ("b.png", "a.JPG", "c.mp4", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "below.png").mkdir()
    assert [path.name for path in find_pictures([tmp_path])] == ["a.JPG", "b.png", "c.mp4"]


def test_a_clip_becomes_an_animation_with_one_map_a_frame(tmp_path, vipo):
    write_film(tmp_path / "film.mp4", moving())
    done = vipo("map", tmp_path / "film.mp4", "-o", tmp_path / "out.png", "--raw", "npy")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "out.png") as animation:
        assert animation.n_frames == 4
        assert animation.info["duration"] == 125
    maps = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert maps.shape == (4, 16, 16)
    columns = (maps.mean(axis=1) * np.arange(16)).sum(axis=1) / maps.mean(axis=1).sum(axis=1)
    assert (np.diff(columns) > 0).all()


def test_rules_and_sizes_are_compared_and_arrays_written(scene, tmp_path, vipo):
    from safetensors import safe_open

    target = tmp_path / "rules.png"
    sizes = ("--layer", "2", "--input-size", "64", "--input-size", "96")
    done = vipo("map", scene, "-o", target, "--orientation", "all", *sizes, "--raw", "safetensors")
    assert done.code == 0, done.err
    assert done.out.split() == [str(target)]
    rules = get_args(Orientation)
    with safe_open(target.with_suffix(".safetensors"), "pt") as arrays:
        configs = [json.loads(arrays.metadata()[f"perception.{index}"]) for index in range(2 * len(rules))]
        assert [item["orientation"] for item in configs] == [*rules, *rules]
        assert [item["input_size"] for item in configs] == [64] * len(rules) + [96] * len(rules)
        assert arrays.get_tensor("map.0").shape == (16, 16)
        assert arrays.get_tensor("components.0").shape == (3, 8, 8)
        opposite = (rules.index("inverted_sklearn"), rules.index("none"))
        one, other = (arrays.get_tensor(f"components.{index}") for index in opposite)
        assert torch.allclose(one, 1 - other, atol=1e-6)
        ratios = arrays.get_tensor("explained_variance_ratio.0")
        assert ratios.sum() < 1
        assert (ratios.diff() < 0).all()


@pytest.mark.usefixtures("no_model")
def test_options_that_do_not_fit_are_refused(scene, tmp_path, vipo):
    several = ("map", scene, "-o", tmp_path / "o.png", "--orientation", "all")
    vipo(*several, "--raw", "npy").refuses("one .npy file cannot hold", "safetensors")
    vipo(*several, "--raw", "zip").refuses("--raw", "'zip'")
    vipo("map", scene, "-o", tmp_path / "o.png", "--style", "veil").refuses("--style", "sheet, overlay, contour")
    vipo("map", scene, "-o", tmp_path / "o.png", "--orientation", "up").refuses("orientation")
    two = ("--backbone", "efficientnet_lite0", "--backbone", "resnet50", "--weights", "w.safetensors")
    vipo("map", scene, "-o", tmp_path / "o.png", *two).refuses("--weights", "one backbone")
    assert not (tmp_path / "o.png").exists()
