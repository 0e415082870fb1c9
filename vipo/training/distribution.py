"""The processes that train one run together: who takes which samples, what is summed, what each one holds.

Accelerate gives the process group, DistributedDataParallel and the gathers; `fully_shard` (FSDP2) is PyTorch's own,
because accelerate offers it on GPUs alone. Samples are spread over the data-parallel processes only (`data_rank` of
`data_processes`), so that processes that would share one long video can be added beside them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from vipo.config.training import DistributionConfig
from vipo.training.errors import TrainingError
from vipo.training.meetings import NOTICE, Meetings
from vipo.training.ranks import check_own_gpu, drop_foreign, own_place
from vipo.training.sharding import fill, group_backend, join_alone, shard, whole_state

# The name of a parameter that no call uses.
_UNUSED = "never_used"


class Distribution:
    """The process group of a run; a group of one where nothing was launched.

    Attributes:
        config: section `distribution`.
        device: of this process; the configured one, or with several processes on GPUs the one of its local rank.
        meetings: where the processes wait for each other.
    """

    def __init__(self, config: DistributionConfig, device: str) -> None:
        """Join the group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

        Args:
            config: section `distribution`.
            device: ``generator.device``.

        Raises:
            TrainingError: another number of processes was launched than is configured, each would take one GPU and
                there are fewer, the environment contradicts itself, or they did not find each other.
        """
        place = own_place(os.environ)
        launched = place.size
        if launched != config.world_size:
            raise TrainingError(
                f"{launched} processes were launched, but distribution.processes {config.processes} x "
                f"distribution.nodes {config.nodes} is {config.world_size}: make them equal, or start 'vipo train' "
                "without a launcher: it starts its processes itself"
            )
        if launched > 1 and device not in ("cpu", "cuda"):
            raise TrainingError(
                f"generator.device {device!r}: several processes take one GPU each; set generator.device=cuda"
            )
        if launched > 1:
            check_own_gpu(place, device)
        self.config = config
        store = self._join(device) if launched > 1 else None
        # Precision is generator.precision, whatever `accelerate launch` puts into the environment.
        drop_foreign(place)
        # DDP that looks for unused parameters keeps its first buckets. Else it lays them out anew after its first sums,
        # and places in a bucket decide in which order three terms are added: a run that goes on would do otherwise.
        kept = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[kept])
        self.device = self._accelerator.device if launched > 1 else torch.device(device)
        asked = _collectives(self.device) if launched > 1 and self.device.type == "cuda" else None
        self.meetings = Meetings(store, place.rank, launched, config.timeout_seconds, asked)
        if self.shards and launched == 1:
            join_alone(self.device)

    def _join(self, device: str) -> Store:
        seconds, meeting = self.config.timeout_seconds, "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
            # NCCL's own watchdog ends whoever waits, without a word of the one that does not come: `Meetings` is first.
            # Both backends of a group have one time.
            wait = timedelta(seconds=seconds + (4 * NOTICE if device == "cuda" else 0))
            dist.init_process_group(group_backend(device), store=store, rank=rank, world_size=size, timeout=wait)
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise TrainingError(
                    f"{meeting}: in use; another program has the port where the processes of this run meet. Start the "
                    "same command again, or set another MASTER_PORT"
                ) from error
            raise TrainingError(
                f"the {self.config.world_size} processes did not find each other at {meeting} within "
                f"distribution.timeout_seconds {seconds:g} ({error}); is one missing, or MASTER_ADDR not reachable?"
            ) from error
        return store

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return self._accelerator.num_processes

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    @property
    def data_processes(self) -> int:
        """Over how many processes samples are spread."""
        return self.processes

    @property
    def data_rank(self) -> int:
        """Which of them this one is."""
        return self.rank

    @property
    def shards(self) -> bool:
        """Whether each process has some rows of the network only, or has it in main memory."""
        return self.config.shards

    # ---- the network ------------------------------------------------------------------------------

    def wrap(self, network: nn.Module, precision: str) -> nn.Module:
        """The network as it is called from now on: replicated (DDP) or sharded over the processes (FSDP2).

        A sharded network keeps fp32 weights; with `precision` ``bf16`` it is gathered in bf16 and its gradients are
        reduced in fp32. A network without gradients is sharded too. With ``offload`` the shards are in main memory.

        Args:
            network: on this process's device, the same on every process. One that is to be sharded may be in main
                memory, from where it is moved block by block, and without weights (on the meta device) everywhere but
                in the main process, whose weights each then has its rows of.
            precision: ``generator.precision``.
        """
        if not self.shards:
            if self.processes == 1 or not any(value.requires_grad for value in network.parameters()):
                return network
            # With none unused DDP would warn at each start, past Python. The network itself does not keep it.
            network.register_parameter(_UNUSED, nn.Parameter(torch.zeros(1, device=self.device)))
            replicated: nn.Module = self._accelerator.prepare_model(network, evaluation_mode=False).eval()
            delattr(network, _UNUSED)
            return replicated
        empty = any(value.is_meta for value in network.parameters())
        some_empty = any(self.everyones(empty))
        whole = dict(network.state_dict()) if some_empty and self.is_main else {}
        shard(network, self.device, self.processes, precision, offload=self.config.offload)
        if some_empty:
            fill(network, self.device, whole, offload=self.config.offload)
        return network

    def unwrap(self, network: nn.Module) -> nn.Module:
        """The network itself, whose parameters have their own names."""
        return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network

    @contextlib.contextmanager
    def gradients(self, network: nn.Module, last: bool) -> Iterator[None]:
        """Around a backward pass: replicated gradients are averaged at the `last` one of an optimizer step alone."""
        # Sharded ones at every pass, because whole gradients are what there is no room for.
        if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
            with network.no_sync():
                yield
        else:
            yield

    def full_state(self, network: nn.Module) -> dict[str, Tensor] | None:
        """Of a sharded network, its whole state on the CPU of the main process (empty on the others); else None."""
        return whole_state(network, keep=self.is_main)

    # ---- values of all processes ------------------------------------------------------------------

    def in_order(self, local: Tensor, rows: Sequence[int]) -> Tensor:
        """Values ``(n, ...)`` of this process's samples `rows`, gathered to ``(N, ...)`` in the order of all."""
        if self.processes == 1:
            return local
        self.meetings.meet()
        order = self._accelerator.gather(torch.tensor(rows, device=self.device)).argsort()
        return self._accelerator.gather(local.to(self.device).contiguous())[order]

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes, on each of them."""
        if self.processes == 1:
            return values
        self.meetings.meet()
        return self._accelerator.reduce(values)

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        if self.processes == 1:
            return value
        self.meetings.meet()
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def everyones(self, value: Any) -> list[Any]:
        """A JSON-like value of each process, by rank."""
        if self.processes == 1:
            return [value]
        self.meetings.meet()
        values = [None] * self.processes
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Give the group back; nothing may be gathered any more."""
        if self.processes > 1:
            self._accelerator.end_training()
        elif self.shards:
            dist.destroy_process_group()


def _collectives(device: torch.device) -> Callable[[], int]:
    """How many collectives this process has asked NCCL for by now."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    # PyTorch's stubs have it of a whole group alone, which answers for one of its backends.
    return lambda: int(backend._get_sequence_number_for_group())  # type: ignore[attr-defined]
