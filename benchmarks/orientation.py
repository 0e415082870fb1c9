"""Score orientation rules, layers and input sizes of a backbone on drawn scenes with known object masks.

    python benchmarks/orientation.py [--backbone NAME] [--layers 1 2 3] [--sizes 96 128] [--scenes 40] [--seed 0]

Prints one Markdown table: area under the ROC curve of the map against the objects, mean and share of scenes below 0.5
(the map lies on the background), by kind of scene, and the time of the module on 16 pictures of 64x64 with one thread.
"""

import argparse
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from vipo.config.models import PerceptionConfig
from vipo.demo.scenes import IMAGE_SIZE, Scene, draw, object_mask, sample_scene
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.perception.scoring import score_orientations

LATENT = 16

KINDS: Mapping[str, Callable[[Scene], bool]] = {
    "centred": lambda scene: scene.relation is None and scene.objects[0].position == "in the middle",
    "off centre": lambda scene: scene.relation is None and scene.objects[0].position != "in the middle",
    "large": lambda scene: scene.relation is None and scene.objects[0].size == "large",
    "small": lambda scene: scene.relation is None and scene.objects[0].size == "small",
    "two objects": lambda scene: scene.relation is not None,
}


def drawn(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures ``(N, 3, 64, 64)`` and object masks ``(N, 64, 64)`` of `count` scenes of one kind."""
    rng = np.random.default_rng([seed, *kind.encode()])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, two_objects=0.3)
        if KINDS[kind](scene):
            scenes.append(scene)
    masks = [np.max([object_mask(item) for item in scene.objects], axis=0) for scene in scenes]
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes])), torch.from_numpy(np.stack(masks)).float()


def milliseconds(structuring: PerceptualStructuring, repeats: int = 7) -> float:
    """Median time of the maps of 16 pictures."""
    images, _ = drawn("centred", 16, 0)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        structuring(images, (LATENT, LATENT))
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 160])
    parser.add_argument("--scenes", type=int, default=40, help="scenes of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    sets = {kind: drawn(kind, arguments.scenes, arguments.seed) for kind in KINDS}
    print(f"| layer | input | ms | rule | {' | '.join(KINDS)} | all, {LATENT}x{LATENT} | all, pixels | below 0.5 |")
    print("|" + "---|" * (len(KINDS) + 7))
    for layer in arguments.layers:
        for size in arguments.sizes:
            config = PerceptionConfig(
                backbone=arguments.backbone, weights=arguments.weights, layer=layer, input_size=size
            )
            backbone = load_backbone(config)
            spent = milliseconds(PerceptualStructuring(backbone, config))
            latent, pixel = (
                {kind: score_orientations(backbone, config, *pair, (grid, grid)) for kind, pair in sets.items()}
                for grid in (LATENT, IMAGE_SIZE)
            )
            for rule in latent["centred"]:
                every = torch.cat([scores[rule] for scores in latent.values()])
                every_pixel = torch.cat([scores[rule] for scores in pixel.values()])
                cells = [f"{float(scores[rule].mean()):.3f}" for scores in latent.values()]
                cells += [f"{float(every.mean()):.3f}", f"{float(every_pixel.mean()):.3f}"]
                cells += [f"{100 * float((every < 0.5).double().mean()):.1f} %"]
                print(f"| {layer} | {size} | {spent:.0f} | {rule} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
