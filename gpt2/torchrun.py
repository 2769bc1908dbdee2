"""torchrun for the processes of one machine: `python -m gpt2.torchrun --nproc-per-node=8 -m gpt2.train DIRECTORY`.

The store through which the processes meet listens on the loopback interface; that of `torchrun --standalone` listens on
all interfaces and answers whoever connects.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.run import main as torchrun

LOOPBACK = "127.0.0.1"


class Loopback(C10dRendezvousBackend):
    @property
    def name(self) -> str:
        return "loopback"


def loopback_store() -> TCPStore:
    """A store that this process serves on a free port of the loopback interface."""
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def on_loopback(parameters: RendezvousParameters) -> RendezvousHandler:
    """torchrun's c10d rendezvous; its own store and the one for the processes are on loopback."""
    store = loopback_store()
    handler = create_handler(store, Loopback(store, parameters.run_id), parameters)
    # torch has no option for it; a test looks at the sockets
    handler._create_tcp_store_server = lambda master_addr, master_port: loopback_store()  # type: ignore[method-assign]
    return handler


def main(arguments: list[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous_handler_registry.register("loopback", on_loopback)
    meeting = ["--rdzv-backend=loopback", f"--rdzv-endpoint={LOOPBACK}:0", f"--rdzv-id={uuid.uuid4()}"]
    torchrun([*meeting, f"--local-addr={LOOPBACK}", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
