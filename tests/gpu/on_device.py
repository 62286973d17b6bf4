"""Which tests of tests/python do not run on another device, and why: all others do.

Tests are named by file and a part of their name: "test_ops.py::compiled".
"""

from __future__ import annotations

from collections.abc import Iterator

# Whole files.
OF_THE_CPU = {
    "test_bench.py": "of the benchmark's own parts, on the CPU",
    "test_devices.py": "of what shows without a GPU",
    "test_model_files.py": "of files, on the CPU",
    "test_optim_paged_limit.py": "of states in files: the CPU's",
    "test_packaging.py": "of packages, on the CPU",
    "test_plan.py": "of a plan that computes nothing",
    "test_robustness.py": "of other threads and processes, on the CPU",
    "test_threads.py": "of the CPU's threads",
}

# Whole files that nobody has run to their end on another device: to be tried and taken off.
NOT_TRIED = {"test_optim_numerics.py"}

NOT_ON_DEVICE = {
    "expects the name of the CPU": (
        "test_functional_8bit.py::[devices]",
        "test_ops_optim.py::-meta]",
        "test_ops.py::test_float64_checks_out",
    ),
    "of the CPU's threads": (
        "test_experts_ops.py::bytes_do_not_depend_on_threads",
        "test_int8_ops.py::bytes_do_not_depend_on_threads",
        "test_ops.py::bytes_do_not_depend_on_threads",
        "test_ops_optim.py::bytes_do_not_depend_on_threads",
    ),
    "a device's codes are not read by the host": (
        "test_functional_8bit.py::test_bad_input[descending code]",
        "test_functional_8bit.py::test_bad_input[nan code]",
        "test_ops_optim.py::test_codes_are_checked",
    ),
    "a device's routing is not read by the host": (
        "test_experts_ops.py::got 5 for",
        "test_experts_ops.py::got -1 for token 0, slot 0",
        "test_experts.py::test_errors",
        "test_experts_error.py::test_an_id_out_of_range_is_refused",
    ),
    # Theirs are in tests/gpu/comparison.py and in crates/halfbyte-gpu/tests.
    "the bound is that of products with weights that are not rounded to 16 bits": (
        *(
            f"test_experts_error.py::{name}{dtype}"
            for name in (
                "test_4bit_forward_is_within_the_bound[nf4-",
                "test_4bit_forward_is_within_the_bound[fp4-",
                "test_4bit_gradient_is_within_the_bound[nf4-",
                "test_4bit_gradient_is_within_the_bound[fp4-",
                "test_8bit_gradient_is_within_the_bound[",
            )
            for dtype in ("dtype1", "dtype2")
        ),
        "test_experts_error.py::test_autograd_of_4bit",
        "test_experts_error.py::test_autograd_of_8bit",
        *(
            f"test_int8_error.py::test_the_input_gradient_is_within_the_bound[shape{shape}-{dtype}"
            for shape in (1, 2, 3, 4)
            for dtype in ("dtype1", "dtype2")
        ),
    ),
    "of the CPU's instruction sets": (
        "test_int8_error.py::test_every_instruction_set_equals_the_definition",
    ),
    "of statistics, which are on the CPU": (
        "test_outliers.py::test_planted_columns_are_found_exactly",
        "test_outliers.py::test_shares_equal_those_in_float64",
        "test_outliers.py::test_the_figure",
    ),
    "of files, on the CPU": ("test_packed_slices.py::test_only_the_slice_is_read_from_a_file",),
    "a device's columns are not read by the host": (
        "test_int8_ops.py::0 to 95, got -1",
        "test_int8_ops.py::outlier_cols must hold columns of A",
    ),
    "of a map on the CPU": (
        "test_functional_8bit.py::test_default_code_is_the_signed_dynamic_map",
    ),
    "of states in files: the CPU's": (
        "test_optim_paged.py::test_a_folder_that_cannot_be_used",
        "test_optim_paged.py::test_a_full_disk",
    ),
    "the compiler cannot trace a subclass of Tensor under the mode that sets the device": (
        "test_embedding8bit.py::test_in_a_compiled_model",
        "test_experts.py::test_compiles_without_a_break[Experts4bit]",
        "test_linear8bit.py::test_compile",
        "test_nn_embedding.py::test_in_a_compiled_model",
        "test_nn_linear4bit.py::test_compile_a_whole_model",
        "test_nn_linear4bit.py::test_compile_before_the_first_call",
        "test_nn_linear4bit.py::test_compile_fullgraph",
        "test_nn_linear4bit.py::test_without_torch_function",
    ),
}

NOT_EMULATED = {
    "holds a sparse tensor": (
        "test_functional_4bit.py::[sparse]",
        "test_ops_optim.py::functions_name_no_parameter",
        "test_optim_schedule_free.py::test_failed_steps_do_not_count",
    ),
    "PyTorch's compiler looks for a GPU": (
        "test_experts_ops.py::inductor",
        "test_int8_ops.py::inductor",
        "test_ops.py::inductor",
        "test_ops_optim.py::inductor",
    ),
    "PyTorch's profiler looks for a GPU": (
        "test_embedding8bit.py::test_only_the_rows_asked_for_are_decoded",
    ),
}


def reasons(file: str, name: str, emulated: bool) -> Iterator[tuple[str, str]]:
    """The entries above for a test in a file, each with its reason."""
    if file in OF_THE_CPU:
        yield file, OF_THE_CPU[file]
    if file in NOT_TRIED:
        yield file, "the file was not tried on another device yet"
    for table in (NOT_ON_DEVICE, NOT_EMULATED) if emulated else (NOT_ON_DEVICE,):
        for reason, entries in table.items():
            for entry in entries:
                where, _, part = entry.partition("::")
                if where == file and part in name:
                    yield entry, reason


def entries(files: set[str], emulated: bool) -> set[str]:
    """All entries for tests in those files."""
    tables = [NOT_ON_DEVICE, *([NOT_EMULATED] if emulated else [])]
    listed = {entry for table in tables for group in table.values() for entry in group}
    return {entry for entry in listed if entry.partition("::")[0] in files}
