"""The Rust extension. Importing it goes through :mod:`._load`."""

def bind(version: str, libraries: str) -> None:
    """Binds to the loaded libtorch, of which the version and the folder are known.

    Raises:
        ImportError: when it is older than 2.10, or ``HALFBYTE_ISA`` names what is not there.
    """

def is_registered(namespace: str) -> bool:
    """Whether :func:`register` has run for the namespace."""

def register(namespace: str) -> None:
    """Registers the kernels of every op under ``torch.ops.<namespace>``, for all devices, once."""

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

def add_library_folder(folder: str) -> None:
    """A folder to look for NVRTC in, beside the usual ones. Nothing is opened now."""

def gpu_error(runtime: str, index: int) -> str | None:
    """Why a device of ``"cuda"``, ``"rocm"`` or ``"xpu"`` cannot be used; None when it can.

    Opens the driver.
    """

def gpu_report() -> list[tuple[str, bool, str]]:
    """Name, whether it can be used, and a text, for each back end in the order of the chain.

    Opens every driver.
    """

def take_symbol_error() -> str | None:
    """Why this thread's last call of a C symbol failed, once; None when it did not."""

def managed_zeros(bytes: int, kind: str, index: int) -> object:
    """A DLPack capsule of uint8 zeros that the host and a GPU (``"cuda"`` or ``"xpu"``) share."""

def is_managed(address: int) -> bool:
    """Whether memory came from :func:`managed_zeros`."""

def prefetch_managed(address: int, kind: str, index: int, to_host: bool) -> None:
    """Asks for pages to be moved to the device or the host, in the order of its current stream."""
