"""The directional estimator: the held-out reward before and after steps that change the policy equally."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from vipo.credit.meter.directions import Change, Directions, moved_by
from vipo.credit.meter.gradients import Chains
from vipo.credit.meter.plan import Plan, Record, Reference
from vipo.credit.meter.space import products
from vipo.credit.meter.subject import Subject, drawn_prompts, sample_chains, total_reward
from vipo.prompts import Prompt


class HeldOut:
    """The held-out samples: their reward under the weights as they are now, and how much a step changes the policy."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], plan: Plan) -> None:
        count = min(plan.held_out, len(prompts))
        self._subject, self._plan = subject, plan
        self._prompts = drawn_prompts(prompts, subject.seed, "held-out", 0, count)
        batches = self._sampled()
        self.before = self._by_prompt(batches)
        kept = -(-plan.probes // subject.micro_batch)
        self.change = Change(subject, plan.size, batches[:kept])

    def gains(self, step: Tensor) -> list[float]:
        """Of each prompt, by how much its mean reward rises, with the same noise."""
        with moved_by(list(self._subject.parameters.values()), step):
            after = self._by_prompt(self._sampled())
        gained: list[float] = (after - self.before).tolist()
        return gained

    def _sampled(self) -> list[Chains]:
        wanted = [(prompt, index) for prompt in self._prompts for index in range(self._plan.held_out_samples)]
        return sample_chains(self._subject, "held-out", 0, wanted)

    def _by_prompt(self, batches: Sequence[Chains]) -> Tensor:
        return total_reward(self._subject, batches).reshape(len(self._prompts), -1).mean(dim=1)


def take_steps(
    record: Record,
    gradients: Mapping[str, Tensor],
    directions: Directions,
    tested: HeldOut,
    reference: Reference | None,
    known: float | None,
) -> None:
    """Add to the record what a step along each direction gains, and what the reference says that it would."""
    if known is None:
        first = next(iter(gradients.values()))
        known = tested.change.of(directions.first_step(first)) if bool((first != 0).any()) else None
    record["change"] = known
    lengths: dict[str, float] = {}
    for name, gradient in gradients.items():
        for kind, found in record["sources"][name]["kinds"].items():
            direction = directions(kind, gradient)
            scaled = None if known is None else tested.change.scaled(direction, known, lengths.get(kind))
            if scaled is None:
                found["step"] = {"gains": [0.0] * len(tested.before), "length": 0.0, "change": 0.0}
                if reference is not None:
                    found["step"]["predicted"] = [0.0] * len(reference.batches)
                continue
            step, change = scaled
            lengths[kind] = float(step.double().norm())
            found["step"] = {"gains": tested.gains(step), "length": lengths[kind], "change": change}
            if reference is not None:
                found["step"]["predicted"] = products(step[None], reference.means)[0].tolist()
