"""The simulation of a spread KV cache: formulas by hand, placements, and a fast run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sharding_model import (
    EXCHANGES,
    GEOMETRIES,
    Assumptions,
    balances,
    break_even_tokens,
    by_owner,
    by_xor,
    bytes_held,
    in_turn,
    label_sample,
    moved_in_one_process,
    seconds,
    sent_all_gather,
    sent_dcp,
    sent_gather_kv,
    sent_two_collectives,
)
from simulate_sharding import QUICK, Simulation, main, write
from tolerances import FLOAT64

QWEN, MIXTRAL, GPT_OSS, DEEPSEEK = GEOMETRIES
K = 1024
GIVEN = Assumptions(sampled_pages=64)


@pytest.mark.parametrize(
    ("model", "ranks", "megabytes"),
    [
        (QWEN, 4, "1.20"),
        (QWEN, 8, "1.42"),
        (MIXTRAL, 4, "0.80"),
        (MIXTRAL, 8, "0.95"),
        (GPT_OSS, 4, "0.46"),
        (GPT_OSS, 8, "0.55"),
        (DEEPSEEK, 8, "7.21"),
    ],
)
def test_two_collectives_send_what_was_computed_by_hand(model, ranks: int, megabytes: str):
    assert f"{sent_two_collectives(model, ranks) / 1e6:.2f}" == megabytes


def test_one_all_gather_sends_outputs_and_lse_to_each_other_rank():
    assert sent_all_gather(QWEN, 8) == 48 * 7 * 32 * (128 + 1) * 4
    ratios = [sent_all_gather(QWEN, n) / sent_two_collectives(QWEN, n) for n in (2, 4, 8)]
    assert [f"{ratio:.2f}" for ratio in ratios] == ["1.00", "1.98", "3.91"]


@pytest.mark.parametrize(
    ("model", "tokens", "ranks", "gigabytes"),
    [
        (QWEN, 32 * K, 8, "2.82"),
        (QWEN, 128 * K, 8, "11.27"),
        (MIXTRAL, 128 * K, 4, "12.88"),
        (GPT_OSS, 128 * K, 8, "4.23"),
        (DEEPSEEK, 128 * K, 8, "8.06"),
    ],
)
def test_gathering_kv_sends_the_share_of_a_rank_to_all(model, tokens, ranks, gigabytes: str):
    assert f"{sent_gather_kv(model, ranks, tokens) / 1e9:.2f}" == gigabytes


def test_one_process_moves_queries_out_and_results_back():
    moved = [moved_in_one_process(m, 8) / 1e6 for m in GEOMETRIES]
    assert [f"{count:.2f}" for count in moved[:3]] == ["5.55", "3.70", "2.10"]
    assert moved[3] == 61 * 7 * 128 * (2 * 576 + 2 * 576 + 4) / 1e6


def test_dcp_gathers_queries_and_scatters_outputs():
    queries, lse, outputs = 7 * 4 * 128 * 2, 7 * 32 * 4, 7 / 8 * 32 * 128 * 2
    assert sent_dcp(QWEN, 8) == 48 * (queries + lse + outputs)
    assert sent_dcp(QWEN, 64) is None, "32 heads"
    assert sent_dcp(DEEPSEEK, 64) is not None


def test_one_rank_sends_nothing():
    for model in GEOMETRIES:
        assert {exchange.sent(model, 1, 128 * K) for exchange in EXCHANGES} == {0}


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_pages_in_turn_differ_by_one_page_a_layer(ranks: int):
    found = balances(QWEN, 0.0, ranks, (8 * K, 32 * K), GIVEN)
    for tokens in (8 * K, 32 * K):
        loads = found["spread", tokens].loads
        assert (loads.sum(1) == GIVEN.pages(tokens)).all()
        assert (loads.max(1) - loads.min(1)).max() <= 1
    assert len(set(in_turn(8, 1, 8)[:, 0].tolist())) == 8, "each layer begins elsewhere"


@pytest.mark.parametrize("zipf", [0.0, 1.0])
@pytest.mark.parametrize("model", [MIXTRAL, DEEPSEEK], ids=lambda model: model.name)
def test_owners_stay_within_their_capacity(model, zipf: float):
    found = balances(model, zipf, 8, (32 * K,), GIVEN)["experts", 32 * K]
    mean = GIVEN.pages(32 * K) / 8
    assert found.loads.max() <= max(GIVEN.capacity_factor * mean, np.ceil(mean))
    assert (found.loads.sum(1) == GIVEN.pages(32 * K)).all()


def test_a_page_goes_to_the_owner_until_it_is_full():
    labels = np.array([[0, 0, 0, 0, 3, 3], [-1] * 6])
    # Place 0 owns experts 0 and 1 of layer 0; it takes page n while it holds < ceil((n + 1) / 2).
    assert by_owner(labels, 4, 2, 1.0).tolist() == [[0, 1, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0]]
    assert by_owner(labels, 4, 2, 2.0)[0].tolist() == [0, 0, 0, 0, 1, 1]


def test_the_map_of_pikv():
    labels = np.array([[0, 1, 2, 3, 5, -1]])
    assert by_xor(labels, 4).tolist() == [[0, 0, 0, 0, 1, 1]]


def test_without_popularity_labels_are_as_good_as_uniform_and_with_it_they_are_few():
    given = Assumptions(sampled_pages=800)
    counts = np.bincount(label_sample(MIXTRAL, 0.0, given), minlength=8)
    assert counts.min() > 60, "100 of each are expected, with a standard deviation of 9"
    assert (label_sample(QWEN, 1.0, given) == 0).mean() > 0.9


def test_held_are_pages_tail_and_sliding_layers():
    tokens, ranks = 128 * K, 8
    loads = np.full((GPT_OSS.layers, ranks), GIVEN.pages(tokens) // ranks)
    pages, tail, sliding = 18 * (tokens - 512) / 8, 18 * 512, 18 * 128
    assert bytes_held(GPT_OSS, loads, tokens, GIVEN) == (pages + tail + sliding) * 2048
    whole = np.full((QWEN.layers, 1), GIVEN.pages(tokens))
    assert f"{bytes_held(QWEN, whole, tokens, GIVEN) / 1e9:.2f}" == "12.88"


def test_time_adds_reading_sending_and_latency():
    given = replace(GIVEN, hbm=1e12, link=1e10, latency=1e-5, batch=2)
    loads = in_turn(MIXTRAL.layers, given.pages(8 * K), 2)
    loads = np.stack([(loads == place).sum(1) for place in (0, 1)], axis=1)
    read = 2 * 32 * ((8 * K - 512) / 2 + 512) * 4096 / 1e12
    sent = 2 * 32 * 32 * 129 * 4 / 1e10
    found = seconds(MIXTRAL, EXCHANGES[1], 2, 8 * K, loads, given)
    assert found == pytest.approx(read + sent + 32 * 1e-5, rel=FLOAT64)
    whole = seconds(MIXTRAL, EXCHANGES[0], 2, 8 * K, loads, given)
    assert whole == pytest.approx(2 * 32 * 8 * K * 4096 / 1e12, rel=FLOAT64)


def test_at_the_break_even_both_take_equally_long():
    given = replace(GIVEN, batch=3)
    tokens = break_even_tokens(MIXTRAL, 4, given)
    layer = 4096 / given.hbm
    spread = ((tokens - 512) / 4 + 512) * layer + 3 * 32 * 129 * 4 / given.link
    assert tokens * layer == pytest.approx(spread + given.latency / 3, rel=FLOAT64)


@pytest.fixture(scope="module")
def quick() -> Simulation:
    done = Simulation(QUICK, GIVEN)
    done.run()
    return done


def test_a_quick_run_has_all_cases_and_is_written_as_json(quick: Simulation, tmp_path: Path):
    write(quick.record(), tmp_path / "sub" / "found.json")
    found = json.loads((tmp_path / "sub" / "found.json").read_text())
    cases = len(GEOMETRIES) * len(QUICK.ranks) * len(QUICK.tokens)
    assert len(found["placed"]["rows"]) == cases * len(QUICK.zipf) * 3
    assert len(found["time"]["rows"]) == cases * len(EXCHANGES)
    assert found["assumptions"]["latency"] == GIVEN.latency


def test_equal_seeds_give_equal_results(quick: Simulation):
    again = balances(QWEN, 0.5, 8, QUICK.tokens, GIVEN)
    for (placement, tokens), balance in again.items():
        wanted = {"model": QWEN.name, "ranks": 8, "zipf": 0.5, "tokens": tokens}
        cell = quick.placed.cell("per_layer", placement=placement, **wanted)
        assert cell == round(balance.per_layer, 4)


def test_the_picture_is_drawn(quick: Simulation, tmp_path: Path):
    from draw_sharding import draw

    draw(quick.record(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_names_its_assumptions_and_writes_nothing_if_quick(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    main(quick=True, out=tmp_path, link=123.0)
    text = capsys.readouterr().out
    assert "ASSUMPTIONS (nothing is measured on a GPU)" in text
    assert "123 GB/s" in text
    assert not list(tmp_path.iterdir())
