"""The Pulumi program. Everything is in remotegpu_network/: read its docstring first."""

from pathlib import Path

from remotegpu_network import stack

stack.run(Path(__file__).resolve().parent)
