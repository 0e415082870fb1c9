"""AdamW with 8-bit moments: bitsandbytes', with a state that checkpoints can hold. Imported where it is chosen."""

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit as _AdamW8bit
from torch import Tensor

_SMALL, _BLOCK = 4096, 256
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


class AdamW8bit(_AdamW8bit):
    """The library's, of which every entry of the state is a tensor.

    The state of a parameter with at least 4096 values is two moments of a byte a value, and their scales, one for 256
    values; of a smaller one two fp32 moments. What a byte stands for is the same table for all, and no part of it.
    """

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's."""
        state = {index: self._plain(self.state[value]) for index, value in enumerate(self._parameters())}
        return {
            **super().state_dict(),
            "state": {index: own for index, own in state.items() if own},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Restore the state that `state_dict` gave, on the parameters' devices; rates and groups stay."""
        parameters = self._parameters()
        for index, values in state_dict["state"].items():
            device = parameters[index].device
            own: dict[str, Any] = {name: value.to(device) for name, value in values.items() if name != "step"}
            own["step"] = int(values["step"])
            if "absmax1" in own:
                own |= {name: self.name2qmap[table].to(device) for name, table in _TABLES.items()}
            self.state[parameters[index]] = own

    def state_like(self, parameter: Tensor) -> dict[str, Tensor]:
        """Tensors of the types and shapes of a parameter's state."""
        step, count = torch.tensor(0.0), parameter.numel()
        if count < _SMALL:
            return {"step": step, "state1": parameter, "state2": parameter}
        codes, scales = parameter.to(torch.uint8), torch.zeros(-(-count // _BLOCK))
        return {"step": step, "state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}

    def _parameters(self) -> list[Tensor]:
        return [value for group in self.param_groups for value in group["params"]]

    @staticmethod
    def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: torch.tensor(float(value)) if name == "step" else value
            for name, value in state.items()
            if name not in _TABLES
        }
