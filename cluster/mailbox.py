"""What a training process tells the one who started it, and the one word back: stop.

A tiny Ray actor without CPUs of its own. Workers put messages and go on; the driver
takes them when it likes. Messages are plain values; nothing here knows what they mean.
"""

from typing import Any

import ray


@ray.remote(num_cpus=0, max_concurrency=1)
class _Box:
    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._stop = False

    def put(self, message: Any) -> bool:
        self._messages.append(message)
        return self._stop

    def take(self) -> list[Any]:
        taken, self._messages = self._messages, []
        return taken

    def stop(self) -> None:
        self._stop = True


class Mailbox:
    """Both ends of the box; picklable, so that it can be given to a worker."""

    def __init__(self) -> None:
        self._box = _Box.remote()  # type: ignore[attr-defined]

    def put(self, message: Any) -> bool:
        """Leave a message; tells whether the driver has asked to stop."""
        answer: bool = ray.get(self._box.put.remote(message))
        return answer

    def take(self) -> list[Any]:
        """All messages since the last call, oldest first."""
        messages: list[Any] = ray.get(self._box.take.remote())
        return messages

    def ask_to_stop(self) -> None:
        """Tell whoever puts the next message that the run should stop."""
        ray.get(self._box.stop.remote())
