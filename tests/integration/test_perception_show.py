"""`vipo map`'s figure: what it reads, what it refuses, what it writes."""

import numpy as np
import pytest
import torch
from PIL import Image

from vipo.config.models import PerceptionConfig
from vipo.demo.scenes import draw, sample_scene
from vipo.perception import PerceptionError, show
from vipo.perception.show import map_images, overlay, read_image


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


def test_overlay_is_coloured_where_the_map_is_high():
    heat = torch.zeros(4, 6)
    heat[:, 3:] = 1.0
    image = torch.full((3, 16, 24), 0.5)
    blended = overlay(image, heat)
    assert blended.shape == (3, 16, 24)
    assert 0 <= float(blended.min()) <= float(blended.max()) <= 1
    assert blended[:, :, -1].mean() > blended[:, :, 0].mean() + 0.2
    assert torch.allclose(blended[:, :, 0], torch.full((3, 16), 0.2), atol=0.02)
    assert torch.allclose(overlay(image, 3 * heat), blended)
    with pytest.raises(ValueError, match="image, heat"):
        overlay(image[None], heat)


def test_one_picture_to_a_file(scene, tmp_path):
    target = tmp_path / "deep" / "map.png"
    assert map_images([scene], target, PerceptionConfig()) == [target]
    with Image.open(target) as figure:
        pixels = np.asarray(figure.convert("RGB")).astype(int)
    assert pixels.shape[1] > 2 * pixels.shape[0] > 600
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean() > 0.1
    first = target.read_bytes()
    map_images([scene], target, PerceptionConfig())
    assert target.read_bytes() == first
    assert [path.name for path in target.parent.iterdir()] == ["map.png"]


def test_several_pictures_to_a_folder(scene, tmp_path):
    tall = tmp_path / "in" / "tall $x_y$.jpg"
    Image.fromarray(gradient(90, 40)).save(tall)
    flat = tmp_path / "in" / "flat.png"
    Image.new("L", (30, 30), 128).save(flat)
    written = map_images([scene, tall, flat], tmp_path / "out", PerceptionConfig())
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
    taken = tmp_path / "taken.jpg"
    taken.touch()
    for paths, output, message in (
        ([tmp_path / "absent.png"], tmp_path / "o.png", r"absent\.png: no such file"),
        ([tmp_path], tmp_path / "o.png", "cannot be read as a picture"),
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
    ):
        with pytest.raises(PerceptionError, match=message):
            map_images(paths, output, PerceptionConfig())
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "o.png").exists()
