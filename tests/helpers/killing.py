"""A loss that fails at one call, as if its process were killed there."""

from training.loop.trainer import Loss


class Killed(Exception):
    pass


def killing(loss: Loss, at: int | None) -> Loss:
    """The loss, which raises Killed instead of its call number ``at``; None: never."""
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return loss(model, batch)

    return counted
