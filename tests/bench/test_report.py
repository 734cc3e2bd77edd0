"""Rows as a page and as a spreadsheet."""

import csv
import html
import io
import json
import re
from xml.dom import minidom

import pytest
from typer.testing import CliRunner

from model_support import make_text, save_model
from svdq_bench.cli import app
from svdq_bench.cli.table import cells
from svdq_bench.quality.perplexity_plots import perplexity_plot
from svdq_bench.quality.plots import PLOTS, to_svg
from svdq_bench.quality.report import html_table, write_csv, write_html, write_plot

MACHINE = {"cpu": "A <fast> one", "threads": 2, "memory_bytes": None}


def make_rows():
    """Rows of every benchmark that is drawn, and of one that is not."""
    rows = [{"benchmark": "perplexity", "method": "full cache", "all_in_bits": 32, "kl": 0.0}]
    for method, family, bits, kl in (
        ("svdq 1.25", None, 1.5, 0.02),
        ("KIVI & $x_2$", "kivi", 3.3, 0.08),
    ):
        row = {"benchmark": "perplexity", "method": method, "all_in_bits": bits, "kl": kl}
        rows.append(row | ({"family": family} if family else {}))
    for method in ("full cache", "svdq 1.25"):
        for length in (512, 1024):
            for depth in (0.0, 0.5, None):
                row = {"benchmark": "retrieval", "method": method, "context_tokens": length}
                row |= {"task": "niah_single" if depth is not None else "common_words"}
                row |= {"depth": depth, "accuracy": 0.875, "full_accuracy": 0.9, "samples": 2}
                rows.append(row | {"k_bits": 1, "all_in_bits": 2, "cache_ratio": 3})
    for layer in range(3):
        row = {
            "layer": layer,
            "method": "svdq 1.25",
            "bits": 1.25,
            "relative_error": 0.1 / 2**layer,
        }
        rows.append({"benchmark": "key_error"} | row | {"ratio": 8.0})
        for head in range(2):
            place = {"layer": layer, "head": head}
            rows.append({"benchmark": "bits"} | place | {"bits": 1.5 + layer})
            variances = [2.0 ** -(i + layer) for i in range(16)] + [0.0]
            rows.append({"benchmark": "spectrum"} | place | {"variances": variances})
    for method, low in (("best possible tokens", 0.9), ("landmarks", 0.7)):
        for budget in (1 / 4, 64):
            row = {"benchmark": "sparsity", "method": method, "budget": budget, "tokens": 64}
            rows.append(row | {"recall": low + (budget < 1) / 20})
    for case, ms in (("torch enable_gqa", 20.0), ("svdq post, 1/32", 0.5)):
        for length in (4096, 8192):
            row = {"benchmark": "sparse", "case": case, "kv_len": length}
            rows.append(row | {"ms": ms * length / 4096})
    rows.append({"benchmark": "other", "case": "a thing", "ms": 1.23456})
    return [row | {"machine": MACHINE} for row in rows]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "page.html"
    write_html(path, make_rows(), "Results & <more>")
    return path.read_text(encoding="utf-8")


def test_page_needs_no_other_file(page):
    assert not re.search(r"<(?:link|script|iframe|img)\b", page)
    for reference in re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page):
        target = "".join(reference)
        assert target.startswith(("#", "data:image/png;base64,")), target
    # Names of the SVG language are no addresses that anyone fetches.
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r'https?://[^"\s<]*', page)) <= names


def test_page_has_every_plot_once(page):
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) == len(PLOTS)
    headings = [html.unescape(heading) for heading in re.findall(r"<h2>(.*?)</h2>", page)]
    assert headings == [*(heading for heading, _ in PLOTS.values()), "other"]
    for plot in plots:
        minidom.parseString(plot)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def test_plots_show_what_rows_say(page):
    error, recall, times, heat, bits, spectrum, keys = re.findall(
        r"<svg.*?</svg>", page, flags=re.DOTALL
    )
    for label in ("svdq 1.25", "KIVI &amp; $x_2$", "kivi", "bits a key number"):
        assert label in error
    assert ">full" not in error  # the full cache has no error to show
    for label in ("best possible tokens", "landmarks", ">1/4<", ">64 tokens<"):
        assert label in recall
    for label in ("torch enable_gqa", "svdq post, 1/32", ">4,096<", ">20<"):
        assert label in times
    assert heat.count(">88<") + heat.count(">87<") == 2 * 2 * 2  # methods, lengths, depths
    assert all(label in heat for label in ("full cache", "1,024", "50 %"))
    assert [bits.count(f">{value}<") >= 2 for value in ("1.5", "2.5", "3.5")] == [True] * 3
    assert "layer 0" in spectrum
    assert "layer 2" in spectrum
    assert "svdq 1.25" in keys


@pytest.mark.parametrize("benchmark", PLOTS)
def test_plot_is_a_file(tmp_path, benchmark):
    rows = [row for row in make_rows() if row["benchmark"] == benchmark]
    write_plot(tmp_path / "new" / "plot.svg", rows + make_rows())
    minidom.parse(str(tmp_path / "new" / "plot.svg"))


def test_what_is_not_drawn(tmp_path):
    depthless = [row for row in make_rows() if row.get("task") == "common_words"]
    for rows in ([], make_rows()[-1:], depthless):
        with pytest.raises(ValueError, match="not drawn"):
            write_plot(tmp_path / "plot.svg", rows)
    assert not list(tmp_path.iterdir())


def test_page_escapes_and_tells_the_machine(page):
    assert "<h1>Results &amp; &lt;more&gt;</h1>" in page
    assert "cpu A &lt;fast&gt; one, threads 2" in page
    assert "memory_bytes" not in page
    assert "Tasks that the model itself can do: common_words, niah_single." in page
    assert "<td>KIVI &amp; $x_2$</td>" in page
    assert "<td>a thing</td><td>1.235</td>" in page


def test_page_is_the_same_every_time(page, tmp_path):
    write_html(tmp_path / "again.html", make_rows(), "Results & <more>")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_page_of_tasks_without_depth_has_no_heat_map(tmp_path):
    rows = [row for row in make_rows() if row.get("task") == "common_words"]
    write_html(tmp_path / "page.html", rows, "x")
    text = (tmp_path / "page.html").read_text()
    assert "<svg" not in text
    assert "common_words" in text


def test_pages_need_rows(tmp_path):
    for rows in ([], [{"method": "x"}]):
        with pytest.raises(ValueError, match="each with its benchmark"):
            write_html(tmp_path / "page.html", rows, "x")
    assert not any(tmp_path.iterdir())


def test_html_table_leaves_out_what_no_row_has():
    text = html_table([{"b": 1000, "method": "x", "c": None}, {"method": "y", "d": [1, 2]}])
    assert "<th>method</th><th>b</th><th>d</th>" in text
    assert "<tr><td>x</td><td>1,000</td><td></td></tr>" in text
    assert "<td>[1, 2]</td>" in text


def test_csv_has_a_column_for_every_key(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows = make_rows()
    write_csv(path, rows)
    found = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert len(found) == len(rows)
    assert all(line["machine.cpu"] == "A <fast> one" for line in found)
    for row, line in zip(rows, found, strict=True):
        for key, value in row.items():
            if key == "variances":
                assert json.loads(line[key]) == value
            elif key != "machine":
                assert line[key] == ("" if value is None else str(value))
        assert all(line[key] == "" for key in line if "." not in key and key not in row)


def test_key_error_has_a_table():
    rows = [row for row in make_rows() if row["benchmark"] == "key_error"]
    headings, body = cells(rows)
    assert headings[:4] == ["keys", "no.", "bits", "relative error"]
    assert body == [["svdq 1.25", "1", "1.25", "0.0583", "8.0", "8.0", "8.0"]]


def test_bits_of_several_methods_have_a_panel_each():
    rows = [row for row in make_rows() if row["benchmark"] == "bits"]
    rows = [row | {"method": f"m{i}", "bits": row["bits"] + i} for i in (0, 1) for row in rows]
    plot = to_svg("bits", rows)
    assert [plot.count(f">{label}<") for label in ("m0", "m1", "KV head")] == [1, 1, 2]
    # Layers have 1.5, 2.5, 3.5 bits in one and one more in the other; there are two heads, and a
    # scale for both that ends at 4.5.
    assert [plot.count(f">{value}<") for value in ("1.5", "2.5", "3.5", "4.5")] == [3, 5, 5, 3]


def whole_rows():
    """Rows of caches of which keys and values are coded."""
    row = {"benchmark": "perplexity", "all_in_bits": 3.0, "k_bits": 2.0, "family": "kivi"}
    points = [(4.1, 0.02, {"v_bits": 4}), (5.3, 0.1, {"v_bits": 2})]
    points += [(3.6, 0.01, {"family": "turboquant", "v_bits": 4, "skipped_layers": 2})]
    points += [(7.2, 0.005, {"family": None, "v_bits": 2, "rope": "pre"})]
    points += [(5.0, 0.5, {"family": "think", "v_bits": 4, "kept": 0.25})]
    full = {"benchmark": "perplexity", "method": "full cache", "kl": 0.0, "times_smaller_bf16": 1}
    return [full] + [
        row | {"method": "svdq 1", "times_smaller_bf16": times, "kl": kl} | more
        for times, kl, more in points
    ]


def test_whole_caches_are_drawn_by_their_size():
    rows = whole_rows()
    axes = perplexity_plot(rows).axes[0]
    assert "times smaller than bfloat16" in axes.get_xlabel()
    assert axes.get_yscale() == "log"
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "kivi": [[4.1, 0.02], [5.3, 0.1]],
        "turboquant, 2 exact layers an end": [[3.6, 0.01]],
        "svdq, pre-RoPE": [[7.2, 0.005]],
        "think": [[5.0, 0.5]],
    }
    found = {text.get_text() for text in axes.texts}
    assert found == {"K2 V4", "K2 V2", "K25% V4"}
    # One row with exact values is not comparable, so that keys alone are what is drawn.
    rows[1]["v_bits"] = "exact"
    assert "bits a key number" in perplexity_plot(rows).axes[0].get_xlabel()
    headings, body = cells(rows)
    assert "4.10" in body[1]
    assert "times smaller than bf16, all in" in headings


def test_perplexity_command_writes_all_three(tmp_path):
    save_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(make_text(500))
    files = {kind: tmp_path / "out" / f"rows.{kind}" for kind in ("json", "csv", "html")}
    arguments = [
        "eval", "perplexity", "--model", tmp_path / "tiny", "--text-file", tmp_path / "text.txt",
        "--prefill-tokens", 384, "--predict-tokens", 40, "--window-start", 10, "--preset", "2.25",
        "--peer", "per-channel", "--peer", "kivi:2:64",
        *(part for kind, file in files.items() for part in (f"--{kind}", file)),
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads(files["json"].read_text())
    full, svdq, matched, kivi = rows
    assert svdq["k_bits"] == 2.25
    assert matched["matched"] == f"per-channel, matched to {svdq['method']}"
    assert kivi["method"] == "KIVI 2-bit, groups of 64"
    assert {row["sink_tokens"] for row in rows[1:]} == {8}
    assert files["csv"].read_text().count("\n") == 5
    assert all(row["method"] in files["html"].read_text() for row in rows)


def test_perplexity_command_tests_peers_alone(tmp_path):
    save_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(make_text(500))
    peers = ("turboquant:3bit_nc:0:8", "kivi:2:32:v4", "kvquant:2:v2", "per-channel:2")
    arguments = [
        "eval", "perplexity", "--model", tmp_path / "tiny", "--text-file", tmp_path / "text.txt",
        "--prefill-tokens", 128, "--predict-tokens", 20, "--window-start", 10, "--preset", "none",
        "--json", tmp_path / "rows.json",
    ]  # fmt: skip
    command = [str(argument) for argument in arguments]
    named = [word for peer in peers for word in ("--peer", peer)]
    result = CliRunner().invoke(app, command + named)
    assert result.exit_code == 0, result.output
    full, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert full["times_smaller_bf16"] == 1
    assert [row["family"] for row in rows] == ["turboquant", "kivi", "kvquant", "per-channel"]
    assert [row["v_bits"] for row in rows] == [3, 4, 2, "exact"]
    assert all(row["times_smaller_bf16"] < row["cache_ratio"] for row in rows[1:])
    result = CliRunner().invoke(app, [*command, "--peer", "kivi"])
    assert result.exit_code == 2
    assert "kivi alone is matched to an svdq preset, and there is none" in result.output


@pytest.mark.parametrize("command", ["perplexity", "retrieval"])
def test_peers_that_are_none_are_one_line(command):
    result = CliRunner().invoke(app, ["eval", command, "--peer", "kv:3"])
    assert result.exit_code == 2
    assert result.output.strip() == (
        "svdq: error: peers are per-channel, kivi, think, quantized, kvquant, turboquant, got 'kv'"
    )
