"""The Rust extension. Importing it goes through :mod:`._load`."""

def bind(version: str, libraries: str) -> None:
    """Binds to the loaded libtorch, of which the version and the folder are known.

    Raises:
        ImportError: when it is older than 2.10, or ``HALFBYTE_ISA`` names what is not there.
    """

def is_registered(namespace: str) -> bool:
    """Whether :func:`register` has run for the namespace."""

def register(namespace: str) -> None:
    """Registers the CPU kernels of every op under ``torch.ops.<namespace>``, once."""

def take_error() -> Exception | None:
    """Why this thread's last failed op failed, once; None when there is nothing to take."""

def check_blocksize(blocksize: int) -> None:
    """Raises ValueError unless there are blocks of that size."""

def check_quant_type(quant_type: str) -> None:
    """Raises ValueError unless it is ``"nf4"`` or ``"fp4"``."""

def prefer_huge_pages(address: int, bytes: int) -> None:
    """Asks the system for huge pages under fresh memory of that many bytes; a hint."""

def version() -> str:
    """The version of this package."""

def abi_version() -> tuple[int, int]:
    """Major and minor version of the libtorch in use."""

def isa() -> str:
    """The instruction set that kernels use."""

def available_isas() -> list[str]:
    """The instruction sets of this machine, slowest first."""

def num_threads() -> int:
    """The number of threads that the last op used."""

def code4(quant_type: str) -> list[float]:
    """The 16 values of a 4-bit type, by index."""

def dynamic_map(signed: bool, max_exponent_bits: int, total_bits: int) -> list[float]:
    """256 values, ascending."""

def linear_map(signed: bool, total_bits: int, add_zero: bool) -> list[float]:
    """256 values, ascending."""

def normal_map(offset: float, use_extra_value: bool) -> list[float]:
    """256 values, ascending."""

def fp8_map(signed: bool, exponent_bits: int, precision_bits: int, total_bits: int) -> list[float]:
    """256 values, ascending."""
