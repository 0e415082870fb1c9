"""The comparisons that train: an update, its resumption, what is exported, and frozen weights in bf16."""

import copy
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vipo.conformance.checks import EXACT, Finding, deterministic_sample, finding, largest
from vipo.conformance.stock import load_trained
from vipo.conformance.subject import Mode, Subject, lesson, loss_of
from vipo.generators.base import GeneratorError
from vipo.generators.pipeline import PipelineGenerator
from vipo.keys import keyed_seed
from vipo.text import listed

# Of what rounds more than the checkpoint's own weights, relative to the largest prediction where that is above 1.
_EXPORTED = 5e-5
_LEARNING_RATE = 1e-3
_SHOWN = 2


def update(compared: Subject, mode: Mode) -> list[Finding]:
    """Before an update every ratio is 1; it changes what is trained and nothing else; resumed, it is the same."""
    generator = compared.load(mode)
    parameters = dict(generator.network.named_parameters())
    before = {name: value.detach().cpu().clone() for name, value in parameters.items()}
    decoder = {name: value.detach().cpu().clone() for name, value in generator.vae.state_dict().items()}
    taught = lesson(generator, compared)
    optimizer = optimizer_of(generator)

    def step(policy: PipelineGenerator, chosen: torch.optim.Optimizer) -> Tensor:
        log_ratio = taught.log_ratios(policy, compared.conditioning)
        loss_of(log_ratio).backward()
        chosen.step()
        chosen.zero_grad(set_to_none=True)
        return log_ratio.detach()

    first = step(generator, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    saved = {name: value.detach().cpu().clone() for name, value in parameters.items() if value.requires_grad}
    second = step(generator, optimizer)

    adapters = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    heard = {name for name in before if not re.fullmatch(generator.untrained, name)}
    meant = adapters if mode == "lora" else heard
    trained = {name for name, value in parameters.items() if value.requires_grad}
    changed = {name for name, value in parameters.items() if not torch.equal(value.detach().cpu(), before[name])}
    unmoved = sorted(trained - changed)
    faults = _named("trained by mistake", trained - meant)
    faults += _named("not trained", meant - trained)
    faults += _named("changed without being trained", changed - trained)
    faults += _named(
        "changed in the autoencoder",
        (name for name, value in generator.vae.state_dict().items() if not torch.equal(value.cpu(), decoder[name])),
    )
    if mode == "lora":
        adapted = {name.partition(".lora_")[0] for name in adapters}
        ends = tuple(f".{target}" for target in compared.lora.targets)
        modules = (name for name, _ in generator.network.named_modules() if f".{name}".endswith(ends))
        wanted = {name for name in modules if not re.fullmatch(generator.untrained, name)}
        faults += _named("adapted by mistake", adapted - wanted)
    if torch.equal(first, second):
        faults.append("after an optimizer step the policy is the same")
    note = f"{len(unmoved)} of {len(trained)} tensors have no way to the prediction: {listed(unmoved, _SHOWN)}"

    resumed = compared.load(mode)
    resumed.network.load_state_dict(saved, strict=False)
    after = {name: value.detach().cpu().clone() for name, value in parameters.items() if value.requires_grad}
    del generator, optimizer, parameters
    again = optimizer_of(resumed)
    again.load_state_dict(state)
    step(resumed, again)
    whole = dict(resumed.network.named_parameters())
    others = [name for name, value in after.items() if not torch.equal(whole[name].detach().cpu(), value)]
    return [
        finding(f"max |log rho|, {mode}", largest(first), EXACT),
        Finding(
            f"what an update changes, {mode}",
            "fails" if faults else "ok",
            note="; ".join(faults) or (note if unmoved else ""),
            names=tuple(unmoved),
        ),
        finding(f"tensors that resuming changes, {mode}", len(others), 0, names=others),
    ]


def optimizer_of(generator: PipelineGenerator) -> torch.optim.Optimizer:
    """Of what is trained, without weight decay: what has no gradient does not move."""
    trained = [value for value in generator.network.parameters() if value.requires_grad]
    return torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=0.0)


def _named(what: str, names: Iterable[str]) -> list[str]:
    return [f"{what}: {listed(sorted(names), _SHOWN)}"] if (names := list(names)) else []


def disturb(generator: PipelineGenerator, by: float = 0.1) -> None:
    """Move what is trained, in proportion to its size; those that begin at zero as if they were of size 1."""
    with torch.no_grad():
        for name, value in generator.network.named_parameters():
            if value.requires_grad:
                drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(keyed_seed(0, name)))
                size = float(value.square().mean().sqrt()) or 1.0
                value.add_(by * size * drawn.to(value.device))


def export(compared: Subject, mode: Mode) -> list[Finding]:
    """What is saved loads into the stock pipeline, which then makes our samples, and into the adapter again."""
    generator = compared.load(mode)
    disturb(generator)
    time = compared.sampled.times(generator)
    ours = deterministic_sample(generator, compared)
    with torch.no_grad():
        predicted = generator.predict(compared.noise, time, compared.conditioning)
    limit = _EXPORTED * max(1.0, largest(predicted))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator.save_network(folder)
        del generator
        stock = compared.sample(load_trained(compared.kind, compared.stock, folder))
        started = compared.load(start=str(folder)) if mode == "lora" else None
        again = compared.load()
        # Twice: what was loaded before must not stay.
        for _ in range(2):
            again.load_network(folder)
    with torch.no_grad():
        loaded = again.predict(compared.noise, time, compared.conditioning)
    apart = max(largest(stock.pictures - ours), largest(stock.prediction - predicted))
    # Or nothing would be shown.
    moved = largest(predicted - compared.sampled.prediction) > 10 * apart
    faults = [] if moved else ["the trained weights predict what the checkpoint's do"]
    found = [
        finding(f"the stock pipeline with exported weights, {mode}", apart, limit, faults),
        finding(f"exported weights loaded again, {mode}", largest(loaded - predicted), limit),
    ]
    if started is not None:
        with torch.no_grad():
            merged = started.predict(compared.noise, time, compared.conditioning)
        found.append(finding("exported LoRA, merged as a start", largest(merged - predicted), limit))
    return found


def frozen_bf16(compared: Subject) -> list[Finding]:
    """Frozen weights that are held in bf16 predict the same bits under autocast; the adapter beside them is fp32."""
    name = "frozen weights in bf16"
    try:
        held = compared.load("lora", precision="bf16", weights="bf16")
    except GeneratorError as error:
        return [Finding(name, "does not apply", note=str(error))]
    whole = compared.load("lora", precision="bf16")
    faults = [] if _same_adapters(held, whole) else ["the adapter that is drawn is another, or not fp32"]
    disturb(held)
    time = compared.sampled.times(held)
    with tempfile.TemporaryDirectory() as folder:
        held.save_network(Path(folder))
        predicted: list[Tensor] = []
        for generator in (held, whole):
            generator.load_network(Path(folder))
            with torch.no_grad():
                predicted.append(generator.predict(compared.noise, time, compared.conditioning))
    if not _same_adapters(held, whole, rounded=False):
        faults.append("the adapter that is loaded is another, or not fp32")
    return [finding(name, largest(predicted[0] - predicted[1]), 0.0, faults)]


def _same_adapters(held: PipelineGenerator, whole: PipelineGenerator, *, rounded: bool = True) -> bool:
    one, other = (
        {name: value for name, value in each.network.named_parameters() if ".lora_" in name} for each in (held, whole)
    )
    # What peft draws beside weights in bf16 it draws in bf16.
    return one.keys() == other.keys() and all(
        value.dtype == torch.float32 and torch.equal(value, other[n].bfloat16().float() if rounded else other[n])
        for n, value in one.items()
    )
