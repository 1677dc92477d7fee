"""The gates on the bytes that fused LoRA keeps for backward on a CPU, on the models of benchmarks/lora_cpu.py."""

from benchmarks.lora_cpu import BYTES_GATE, bytes_rows


def test_bytes_kept_for_backward_are_below_full_fine_tuning_and_a_fraction_of_pefts():
    rows = bytes_rows()
    assert {row["model"] for row in rows} == {"bert", "llama", "vit"}
    for row in rows:
        assert row["ours_to_full"] <= 1.0, row
        assert row["ours_to_peft"] <= BYTES_GATE[row["dtype"]], row
