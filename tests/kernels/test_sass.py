"""Instructions that a warp goes through, counted on listings written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predict
from benchmarks.measure import Work
from benchmarks.predict import GPU, floors
from benchmarks.sass import count, find_loops, lines_of, parse

SOURCE = """
def helper(x):
    return x + 1


def kernel(count, limit):
    if count > limit:
        return
    for i in range(count):
        x = i
        for j in range(limit):
            x += helper(j)
        while x > 0:
            x -= 1
    if x == 0:
        x = 2
"""
HELPER, BEFORE, IN_I, IN_J, IN_WHILE, IN_IF = 3, 7, 10, 12, 14, 16  # lines


class Listing:
    """As ``nvdisasm`` writes it."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "operation" / "triton" / "source.py"  # as kernels stand here, beside Triton's own code
        self.source.parent.mkdir(parents=True)
        self.source.write_text(SOURCE)
        self.lines: list[str] = []

    def add(self, line: int, *instructions: str, path: str = "") -> Listing:
        self.lines.append(f'\t//## File "{path or self.source}", line {line}')
        self.lines += [f"        /*{16 * place:04x}*/    {text} ;" for place, text in enumerate(instructions)]
        return self

    def label(self, name: str) -> Listing:
        self.lines.append(f"{name}:")
        return self

    def count(self, trips: dict[str, float], fractions: dict[str, float] | None = None) -> float:
        return count(*parse("\n".join(self.lines)), trips, fractions or {})


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return Listing(tmp_path)


def test_loops_multiply(listing: Listing) -> None:
    listing.add(BEFORE, "MOV R1, R2").label(".L_x_0").add(IN_I, "IADD3 R1").label(".L_x_1").add(IN_J, "FADD", "FMUL")
    listing.add(IN_J, "@P0 BRA `(.L_x_1)").label(".L_x_2").add(IN_WHILE, "@P1 BRA `(.L_x_2)").add(
        IN_I, "@!P2 BRA `(.L_x_0)"
    )
    listing.add(IN_IF, "STG", "EXIT")
    whole = find_loops(*parse("\n".join(listing.lines)))
    assert [loop.name for loop in whole.inner] == ["kernel: i"]
    assert [loop.name for loop in whole.inner[0].inner] == ["kernel: j"]  # the other goes to itself: no way to end
    assert listing.count({"kernel: i": 10, "kernel: j": 4}) == 1 + 10 * (1 + 4 * 3 + 1 + 1) + 2


def test_a_loop_is_named_by_most_of_its_own_instructions(listing: Listing) -> None:
    """Functions that it calls, library code and an inner loop's instructions do not say which loop it is."""
    listing.label(".L_x_0").add(HELPER, "FADD", "FADD").add(43, "FMNMX", path="/x/triton/language/standard.py")
    listing.add(IN_J, "FMUL").label(".L_x_1").add(IN_J, "FADD", "FADD", "@P0 BRA `(.L_x_1)")
    listing.add(IN_I, "@P1 BRA `(.L_x_0)").add(IN_IF, "EXIT")
    whole = find_loops(*parse("\n".join(listing.lines)))
    assert whole.inner[0].name == "kernel: i"
    assert whole.inner[0].inner[0].name == "kernel: j"


def test_an_unknown_loop_is_named(listing: Listing) -> None:
    listing.label(".L_x_0").add(IN_I, "IADD3", "@P0 BRA `(.L_x_0)").add(IN_IF, "EXIT")
    with pytest.raises(ValueError, match="how often does the loop 'kernel: i' go round\\? Known: kernel: k"):
        listing.count({"kernel: k": 3})


def test_blocks_count_by_their_fraction(listing: Listing) -> None:
    """What is moved into a block, and what Triton's own functions do there, runs as often as the block."""
    listing.add(IN_IF - 1, "ISETP", "@P0 BRA `(.L_x_0)").add(IN_IF, "MOV", "MOV").add(IN_I, "IADD3")
    listing.add(43, "SHFL", path="/x/triton/language/standard.py").label(".L_x_0").add(BEFORE, "STG", "EXIT")
    behind_return = {"kernel: return if count > limit": 0.5}
    assert listing.count({}) == 8
    assert listing.count({}, {"kernel: if x == 0": 0.25}) == 4 + 4 * 0.25
    assert listing.count({}, {"kernel: if x == 0": 0.25} | behind_return) == 1 + 1 + 4 * 0.125 + 2 - 0.5 - 0.5


def test_a_return_in_a_nested_if_is_before_all_that_follows(tmp_path: Path) -> None:
    source = """
def kernel(known, statistics):
    if statistics:
        if known:
            return
        x = 1
    y = 2
"""
    (tmp_path / "nested.py").write_text(source)
    lines = lines_of(str(tmp_path / "nested.py"))
    assert lines[4].ifs == ("kernel: if statistics",)
    assert lines[6].ifs == ("kernel: if statistics", "kernel: return if known")
    assert lines[7].ifs == ("kernel: return if known",)


def test_functions_count_by_their_fraction(listing: Listing) -> None:
    listing.add(BEFORE, "MOV", "@P0 BRA `(.L_x_0)").add(HELPER, "FADD", "FADD").label(".L_x_0").add(IN_IF, "EXIT")
    assert listing.count({}, {"helper": 0.5}) == 2 + 1 + 1


def test_what_is_behind_the_last_exit_is_not_counted(listing: Listing) -> None:
    listing.add(BEFORE, "MOV").add(IN_IF, "@P0 EXIT").add(IN_I, "FADD", "EXIT").label(".L_x_9").add(
        IN_IF, "FADD", "NOP"
    )
    listing.add(IN_IF, "BRA `(.L_x_9)")
    assert listing.count({}) == 4


GPU_OF_ONE = GPU("one", 90, multiprocessors=2, clock=1e6, bandwidth=1e6, products=1e6)


@pytest.mark.parametrize(
    ("programs", "warps", "fits", "expected"),
    [
        (8, 4, 3, (400.0, 400.0 / predict.TOGETHER)),  # four a multiprocessor, a warp for each scheduler
        (8, 4, 1, (400.0, 400.0 / predict.ALONE)),
        (1, 4, 3, (100.0, 100.0 / predict.ALONE)),  # one program has one multiprocessor
        (1, 1, 3, (100.0, 100.0 / predict.ALONE)),  # and one warp one scheduler
        (8, 8, 3, (800.0, 800.0 / predict.TOGETHER)),
    ],
)
def test_the_instruction_floor(programs: int, warps: int, fits: int, expected: tuple[float, float]) -> None:
    """100 instructions a warp, a microsecond each."""
    floor, _, _, likely = floors(GPU_OF_ONE, 100, programs, warps, fits, Work(bytes=0, flops=0))
    assert (floor, likely) == pytest.approx(expected)


def test_bytes_and_products_bound_it_too() -> None:
    assert floors(GPU_OF_ONE, 1, 8, 4, 3, Work(bytes=500, flops=0))[2:] == (500.0, 500.0)
    assert floors(GPU_OF_ONE, 1, 8, 4, 3, Work(bytes=0, flops=700))[1::2] == (700.0, 700.0)


def test_the_page_calls_itself_a_prediction() -> None:
    row = predict.Row("a kernel", "H200", "BLOCK 1", 32, 2, 10, 100.0, 1.5, 0.5, 0.25, 2.5)
    before = {"rows": [{"gpu": "H200", "name": "a kernel", "expected": 5.0, "instruction_floor": 3.0}]}
    page = predict.to_markdown([row], {"H200": {"a sum": 1500.0}}, {"triton": "3", "revision": "r", "date": "d"}, {
        **before, "sums": {"H200": {"a sum": 3000.0}}, "provenance": {"revision": "q"}
    })  # fmt: skip
    assert "Predictions, not speeds: nothing here has run on a GPU." in page
    assert "| a kernel | BLOCK 1 | 32 | 2 | 10 | 100 | 1.5 | 0.5 | 0.25 | 2.5 | 5 (floor 3) |" in page
    assert "| a sum | 1.5 | 3 |" in page
    assert page.endswith("Before: revision q.\n")
