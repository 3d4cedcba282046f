"""What benchmarks/predict.py says of cards that were not measured, held to what was measured at slower links."""

import pytest

import predict
from bench import parse_row, rows_in
from step_time import ROOT


SPEED = rows_in(ROOT / "benchmarks/speed.csv")
LINKED = [row for row in SPEED if "+link" in row["label"]]


def seconds(label, compute=2.0, link=25.0):
    row = parse_row(label)
    return predict.step_seconds(predict.workload_of(row), row.level, compute, link)


@pytest.mark.parametrize("measured", LINKED, ids=lambda row: row["label"])
def test_steps_at_a_slower_link_are_predicted(measured):
    of_card = [row for row in SPEED if row["card"] == measured["card"]]
    said = predict.predicted_seconds(parse_row(measured["label"]), of_card, measured["card"])
    assert said == pytest.approx(float(measured["median_s"]), rel=0.15)


def test_a_pass_takes_its_compute_or_its_copies():
    assert seconds("5b-balanced+sft") == 2.0  # nothing is copied
    fast, slow = seconds("5b-offload+sft", link=1e6), seconds("5b-offload+sft", link=1.0)
    assert fast == pytest.approx(2.0)
    # Per weight of the blocks 12 bytes come up before or beside the forward pass, 10 go down meanwhile; then gradients go
    # down, 2 bytes, and activations come up, which are fewer
    assert slow == pytest.approx((12 + 2) * of("5b-offload+sft").num_block_weights / 1e9, rel=1e-3)


def of(label):
    return predict.workload_of(parse_row(label))


def test_states_on_the_gpu_are_not_copied():
    workload = of("5b-offload+sft")
    both_ways = predict.copied_bytes(workload, "offload")
    half = predict.copied_bytes(workload._replace(share=0.5), "offload")
    assert half["forward", "up"] == both_ways["forward", "up"] / 2
    assert half["backward", "up"] == both_ways["backward", "up"]  # activations
    low_bit = predict.copied_bytes(of("5b-offload+sft+8bit"), "offload")
    assert low_bit["forward", "up"] == pytest.approx(both_ways["forward", "up"] / 2, rel=0.01)
    streamed = predict.copied_bytes(workload, "stream")
    assert streamed["backward", "up"] > both_ways["backward", "up"] + 2 * workload.num_block_weights - 1


def test_a_card_is_predicted_to_take_what_memory_auto_takes():
    rows = [{"label": label, "mfu": "0.4"} for label in predict.UTILISATION.values()]
    small, large = predict.Card("RTX 4090", 24, 25), predict.Card("RTX 5090", 32, 50)
    found = predict.predict(small, 96, "5b", False, rows)
    assert (found.level, found.low_bit) == ("offload", False) and 0 < found.share < 0.3
    assert predict.predict(small, 64, "5b", False, rows).low_bit
    assert predict.predict(small, 32, "5b", False, rows) is None
    assert predict.predict(large, 32, "5b", True, rows).level == "balanced"
    assert predict.predict(large, 96, "5b", False, rows).seconds < found.seconds
    assert predict.cell(None) == "-" and predict.cell(found).startswith(f"{found.seconds:.1f} s (offload, ")


def test_a_row_of_no_table_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict.py", "5b-x"])
    with pytest.raises(SystemExit, match="^2$"):
        predict.main()
    assert "error: 5b-x: 5b-x is no MODEL-LEVEL" in capsys.readouterr().err
