"""What benchmarks/launches count without a GPU, in a process that may register a logical device."""

from test_placement import run_on_fakegpu


def test_the_census_counts_known_operators_and_steps() -> None:
    run_on_fakegpu("launches_on_fakegpu.py")
