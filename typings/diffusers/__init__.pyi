# diffusers annotates much of itself wrongly for a type checker (`-> X | tuple`, `tuple[str]` for
# any tuple of strings) and re-exports lazily. Every name of it is Any for pyright.
from typing import Any

def __getattr__(name: str) -> Any: ...
