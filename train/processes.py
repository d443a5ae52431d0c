"""Several processes that train one model, as `torchrun` starts them.

Knows who is first and how numbers are shared; knows nothing of what is trained. One process alone is a group of one.
"""

import torch
from accelerate import PartialState
from torch import distributed


def join(device: torch.device) -> PartialState:
    """Join the other processes, if there are any."""
    return PartialState(cpu=device.type == "cpu")


def leave() -> None:
    """Leave them, when all is done."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def mean_over_processes(number: torch.Tensor) -> torch.Tensor:
    """Return the mean of what the processes hold; it has no gradient.

    Distributed training takes the mean of the gradients. A loss that is a ratio of sums comes out as over all rows at
    once if each process divides its own numerator by the mean denominator.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return number
    total = number.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def same_for_all(numbers: dict[str, float]) -> dict[str, float]:
    """Return what the first process holds: what is decided by numbers must be decided alike."""
    if not distributed.is_initialized():
        return numbers
    held = [numbers]
    distributed.broadcast_object_list(held)
    return held[0]
