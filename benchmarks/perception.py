"""Time and memory of the Perceptual Structuring Module against a reference that takes one picture at a time.

    python -m benchmarks.perception --pixels 224 518

The reference is written here as the paper's steps read: Pillow for the input, one picture a call, scikit-learn's PCA,
SciPy's smoothing. Both see the same 16 pictures of 512x512 and the same ViT-S/14 (DINOv2's shape, random weights: they
cost what trained ones cost). Each repetition times both in turn, so that other work on the machine meets both.

The last row is the module's share of the training steps of `--experiment`, over `--updates` of them, measured where
the update calls it.
"""

import argparse
import json
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from torch import Tensor

from benchmarks.timing import seconds_of
from vipo.config.compose import load_config, repository_root
from vipo.config.perception import PerceptionConfig
from vipo.perception import Backbone, PerceptualStructuring
from vipo.perception.loading import TimmFeatures
from vipo.sampling.noise import keyed_generator
from vipo.stages import encode_stage, prepare_stage
from vipo.training.setup import set_up
from vipo.training.update import update

PICTURES = 16
GRID = (64, 64)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least and median."""
    return {"min": round(min(values), 4), "median": round(statistics.median(values), 4)}


def reference_maps(images: Tensor, backbone: Backbone) -> list[np.ndarray]:
    """The module's maps of ``(B, 3, H, W)``, one picture at a time, with 8-bit pictures and a sign by the border."""
    size, found = backbone.input_size, []
    for image in images.cpu():
        pixels = (image * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        with torch.no_grad():
            cells = backbone.network((tensor.to(backbone.mean.device) - backbone.mean) / backbone.std)[0].cpu().numpy()
        pca = PCA(n_components=3, svd_solver="full")
        scores = pca.fit_transform(cells.reshape(len(cells), -1).T)
        heat = np.zeros(cells.shape[1:])
        for z, share in zip(scores.T.reshape(3, *cells.shape[1:]), pca.explained_variance_ratio_, strict=True):
            inside = np.zeros(z.shape, dtype=bool)
            inside[1:-1, 1:-1] = True
            z = z if z[inside].mean() >= z[~inside].mean() else -z
            heat += share * (z - z.min()) / np.ptp(z)
        heat = gaussian_filter(heat, 1.0)
        heat = (heat - heat.min()) / np.ptp(heat)
        latent = F.interpolate(torch.from_numpy(heat)[None, None], size=GRID, mode="bilinear", antialias=True)[0, 0]
        found.append(((latent - latent.min()) / (latent.max() - latent.min())).numpy())
    return found


def compare(pixels: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One row: the network, the preparation of its input, all the rest, and the reference."""
    # The same weights every time, so that a difference found once can be found again.
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    backbone = Backbone(
        TimmFeatures(model, len(model.blocks) - 1),
        feature_width=model.num_features,
        orientation="border",
        input_size=pixels,
        stride=14,
    ).to(device)
    structuring = PerceptualStructuring(backbone, PerceptionConfig(backbone="vit_small_patch14_dinov2"))
    noise = torch.rand(PICTURES, 3, 16, 16, generator=keyed_generator("benchmark"))
    images = F.interpolate(noise, size=(512, 512), mode="bicubic").clamp(0, 1).to(device)
    inner: list[float] = []
    outer: list[float] = []
    network, whole = backbone.network.forward, backbone.forward
    timed: Any = backbone
    timed.network.forward = lambda pictures: _timed(network, pictures, inner, device)
    timed.forward = lambda pictures: _timed(whole, pictures, outer, device)
    # From the 8 bits that the reference sees: on noise a sign may be a draw that rounding decides.
    seen = (images * 255).to(torch.uint8).float() / 255
    difference = max(
        float(np.abs(ours.cpu().numpy() - theirs).max())
        for ours, theirs in zip(structuring(seen, GRID).maps, reference_maps(images, backbone), strict=True)
    )
    totals, networks, forwards, references = [], [], [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        inner.clear()
        outer.clear()
        totals.append(seconds_of(lambda: structuring(images, GRID), device))
        networks.append(sum(inner))
        forwards.append(sum(outer))
        references.append(seconds_of(lambda: reference_maps(images, backbone), device))
    rest = [total - part for total, part in zip(totals, forwards, strict=True)]
    inputs = [part - network for part, network in zip(forwards, networks, strict=True)]
    return {
        "pixels": pixels,
        "network_seconds": spread(networks),
        "input_seconds": spread(inputs),
        "rest_seconds": spread(rest),
        "rest_share": spread([part / total for part, total in zip(rest, totals, strict=True)]),
        "input_and_rest_share": spread([1 - part / total for part, total in zip(networks, totals, strict=True)]),
        "reference_seconds": spread(references),
        "reference_over_ours": spread([theirs / ours for theirs, ours in zip(references, totals, strict=True)]),
        "largest_difference_of_maps": round(difference, 4),
        "peak_memory_mib": round(
            torch.cuda.max_memory_allocated(device) / 2**20
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        ),
    }


def _timed(forward: Callable[[Tensor], Tensor], pictures: Tensor, seconds: list[float], device: torch.device) -> Tensor:
    features: list[Tensor] = []
    seconds.append(seconds_of(lambda: features.append(forward(pictures)), device))
    return features[0]


def share_of_training(experiment: str, updates: int, device: str, threads: int) -> dict[str, Any]:
    """The module's share of an update of the arm `vipo`."""
    places = [f"generator.device={device}", f"training.threads={threads}"]
    config, root = load_config([f"experiment={experiment}", "arm=vipo", *places]), repository_root()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        prepare_stage(config, root, results)
        encode_stage(config, root, results)
        setup = set_up(config, root, results / config.experiment.name)
        source: Any = setup.sources["backbone"]
        structuring = source.structuring

        def timed(*arguments: Any, **named: Any) -> Any:
            found: list[Any] = []
            seconds.append(seconds_of(lambda: found.append(structuring(*arguments, **named)), setup.device))
            return found[0]

        wrapped: Any = timed
        wrapped.config, source.structuring = structuring.config, wrapped
        update(setup, 1)
        shares, totals, parts = [], [], []
        for number in range(2, updates + 2):
            seconds.clear()
            totals.append(seconds_of(lambda number=number: update(setup, number), setup.device))  # type: ignore[misc]
            parts.append(sum(seconds))
            shares.append(parts[-1] / totals[-1])
    return {"update_seconds": spread(totals), "module_seconds": spread(parts), "module_share": spread(shares)}


def main() -> None:
    """Print one JSON object a row: the comparison at each size, then the share of a training step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 518], help="multiples of 14")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experiment", default="demo", help="whose updates the module's share is measured in")
    parser.add_argument("--updates", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = {"device": arguments.device, "threads": arguments.threads, "torch": torch.__version__}
    for pixels in arguments.pixels:
        print(json.dumps(compare(pixels, arguments.repeats, torch.device(arguments.device)) | setting), flush=True)
    share = share_of_training(arguments.experiment, arguments.updates, arguments.device, arguments.threads)
    print(json.dumps({"experiment": arguments.experiment} | share | setting))


if __name__ == "__main__":
    main()
