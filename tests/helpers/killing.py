"""A loss that dies at a call, as a process does that is killed."""

from training.loop.trainer import Loss


class Killed(Exception):
    pass


def killing(loss: Loss, at: int | None) -> Loss:
    """`loss`, which raises Killed in place of its call number ``at``; None: never."""
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return loss(model, batch)

    return counted
