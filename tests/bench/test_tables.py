"""The tables of documents, filled from results."""

import pytest

from svdq_bench.cli.table import fill_tables


def test_tables_of_a_document_may_join_results():
    full, one, two = ({"benchmark": "perplexity", "method": m} for m in ("full", "one", "two"))
    text = "<!-- table: a b -->\nold\n<!-- end -->\n<!-- table: c -->\nkept\n<!-- end -->"
    text = fill_tables(text, {"a": [full, one], "b": [full, two]})
    assert text == (
        "<!-- table: a b -->\n| keys |\n| --- |\n| full |\n| one |\n| two |\n<!-- end -->\n"
        "<!-- table: c -->\nkept\n<!-- end -->"
    )


def test_tables_of_a_document_may_show_some_columns():
    rows = [
        {"benchmark": "perplexity", "method": m, "k_bits": 2, "perplexity": 8.5, "kl": 0.1}
        for m in ("one", "two")
    ]
    text = (
        "<!-- table: a (perplexity method) -->\nold\n<!-- end -->\n<!-- table: a -->\n<!-- end -->"
    )
    some, _, whole = fill_tables(text, {"a": rows}).partition("<!-- end -->\n")
    assert some == (
        "<!-- table: a (perplexity method) -->\n| perplexity | keys |\n| --- | ---: |\n"
        "| 8.500 | one |\n| 8.500 | two |\n"
    )
    assert "| keys | bits | perplexity | KL |" in whole
    with pytest.raises(ValueError, match="no column 'sinks', only method, k_bits, perplexity, kl"):
        fill_tables("<!-- table: a (method sinks) -->\n<!-- end -->", {"a": rows})


def test_tables_of_a_document_may_go_layer_by_layer():
    machine = dict.fromkeys(("cpu", "backend", "svdq", "torch", "transformers"), "x")
    rows = [
        {"benchmark": "key_error", "layer": layer, "method": "m", "ratio": 2 + layer}
        | {"machine": machine | {"threads": layer}}
        for layer in range(2)
    ]
    text = fill_tables("<!-- layers: a -->\n<!-- end -->", {"a": rows})
    assert "\n| layer | 1 |\n| --- | ---: |\n| 0 | 2.0 |\n| 1 | 3.0 |\n\n" in text
    assert text.count(" threads, backend x") == 2  # both machines
