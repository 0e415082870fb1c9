"""How large a reward's network is, by its files: shapes of tensors are read, and no values."""

from vipo.config.reward_options import NetworkOptions, OnQwenOptions
from vipo.rewards.qwen2_vl import merged, renamed
from vipo.rewards.registry import weight_files
from vipo.rewards.scored import Reward
from vipo.rewards.weights import DTYPES, read_tensors

_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth"})


def network_bytes(reward: Reward, options: NetworkOptions) -> int:
    """Bytes of a reward's network while it is loaded; heads count in its type, though they are float32 in any.

    Args:
        reward: one of vipo's.
        options: its own.

    Raises:
        RewardError: a file cannot be read, or holds half an adapter.
    """
    files = [path for path in weight_files(reward) if path.suffix in _SUFFIXES]
    if isinstance(options, OnQwenOptions):
        # An adapter goes into what it adapts, what was trained stands in the place of the base's, and the base's head
        # for words is left out.
        whole = merged(read_tensors(files, "meta"), 1.0, files[0])
        tensors = [*renamed(whole).values(), *(value for name, value in whole.items() if name.startswith("rm_head."))]
    else:
        tensors = [value for path in files for value in read_tensors([path], "meta").values()]
    return sum(value.numel() for value in tensors if value.is_floating_point()) * DTYPES[options.dtype].itemsize
