"""A local stand-in for Modal: its control plane, its command router, and the machines behind them.

Modal's own client and command line talk to it over gRPC. What it cannot show: it limits neither network nor memory nor
time of a CPU, a volume's writes are there at once, and a machine is a bubblewrap on this kernel, not a gVisor.
"""

from .double import ModalDouble

__all__ = ["ModalDouble"]
