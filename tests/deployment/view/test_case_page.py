"""The page of a test case: its volumes are the run's, and a real browser draws and scrolls them."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html as html_module
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clbench.data.volume import Volume
from clbench.deployment.view import case_page
from clbench.deployment.view.case_page import (
    GRAY_LEVELS,
    LARGEST_BYTES,
    find_case,
    packed_image,
    write_case_page,
)
from clbench.errors import StoreError, UnknownName
from clbench.evaluation.predictions import read_prediction, write_prediction
from clbench.run.record import catalog_of
from clbench.store.record import RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def volume(smoke_run: Path) -> Volume:
    return catalog_of(RunRecord.read(smoke_run)).open(1, "21", "test")


@pytest.fixture(scope="module")
def run(smoke_run: Path, volume: Volume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run, with predictions of btcv/21 that are worth looking at: the truth, shifted."""
    copy = tmp_path_factory.mktemp("run") / "tumor_ext" / "universal" / "r"
    shutil.copytree(smoke_run, copy)
    for step, shift in ((1, 1), (2, -2)):
        path = copy / "predictions" / f"step{step}" / "btcv_21.npz"
        names = read_prediction(path).structures
        order = [volume.names.index(n) for n in names if n in volume.names]
        bits = np.zeros(volume.bits.shape, dtype=np.uint16)
        for k, place in enumerate(order):
            bits |= ((volume.bits >> place) & 1).astype(np.uint16) << np.uint16(k)
        bits = np.roll(bits, shift, axis=0)
        if step == 2:  # a tumor in the liver
            bits |= ((bits >> names.index("liver")) & 1) << names.index("liver_tumor")
        write_prediction(path, bits, names, volume.affine, source="btcv", case="21")
    return copy


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = write_case_page(run, "btcv/21", tmp_path_factory.mktemp("page") / "p.html")
    assert made.size_bytes == made.path.stat().st_size
    return made.path.read_text(encoding="utf-8")


def contents(page: str) -> tuple[dict[str, Any], list[bytes]]:
    """The facts and the unpacked volumes of a page."""
    facts = re.search(r'id="facts">(.*?)</script>', page, re.DOTALL)
    assert facts is not None
    blobs = re.findall(r'class="blob">(.*?)</script>', page, re.DOTALL)
    return json.loads(facts[1]), [gzip.decompress(base64.b64decode(b)) for b in blobs]


def drawn(facts: dict[str, Any], raw: bytes, panel: int, structure: int) -> NDArray[np.bool_]:
    """The mask of a structure in a panel of a page."""
    about = facts["panels"][panel]
    index = np.frombuffer(raw, np.uint16 if about["wide"] else np.uint8).reshape(facts["shape"])
    holds = np.array([structure in pattern for pattern in about["patterns"]])
    mask: NDArray[np.bool_] = holds[index]
    return mask


def test_the_page_holds_what_the_run_stored(page: str, run: Path, volume: Volume) -> None:
    facts, blobs = contents(page)
    names = read_prediction(run / "predictions/step2/btcv_21.npz").structures
    assert [p["title"] for p in facts["panels"]] == ["truth", "after step 1", "after step 2"]
    seen = 0
    for k, name in enumerate(names):
        if name in volume.names:
            truth = (volume.bits >> volume.names.index(name)) & 1 == 1
            np.testing.assert_array_equal(drawn(facts, blobs[1], 0, k), truth, err_msg=name)
        for step in (1, 2):
            stored = read_prediction(run / f"predictions/step{step}/btcv_21.npz")
            mask = np.zeros(volume.bits.shape, bool)
            if name in stored.structures:
                mask = (stored.bits >> stored.structures.index(name)) & 1 == 1
            np.testing.assert_array_equal(drawn(facts, blobs[1 + step], step, k), mask)
            seen += int(mask.sum())
    assert seen > 100
    gray = np.cumsum(
        np.frombuffer(blobs[0], np.uint8).reshape(facts["shape"]), axis=2, dtype=np.uint8
    )
    low, high = volume.window_hu
    exact = np.clip((volume.image.astype(float) - low) / (high - low), 0, 1) * 255
    assert np.abs(gray - exact).max() <= 0.5


def test_the_page_shows_the_scores_of_the_case(page: str, smoke_run: Path) -> None:
    from clbench.store.run_folder import read_scores

    facts, _ = contents(page)
    assert facts["structures"][5]["name"] == "Liver"
    row = next(
        r
        for r in read_scores(smoke_run / "scores.csv")
        if (r.step, r.case, r.structure, r.scoring, r.metric)
        == (2, "21", "liver", "strict", "dice")
    )
    assert row.value > 0
    assert facts["structures"][5]["dice"][1] == row.value


def test_the_page_asks_no_network_for_anything_and_says_phantom(page: str) -> None:
    assert not re.findall(r"(?:src|href)=|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page
    assert "PHANTOM" in page.split("<title>")[1].split("</title>")[0]
    assert '<p class="phantom">PHANTOM' in page


def test_cases_of_patients_are_not_called_phantom(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord.read(run)
    record.patients = True
    catalog = catalog_of(RunRecord.read(run))
    monkeypatch.setattr(case_page.RunRecord, "read", lambda folder: record)
    monkeypatch.setattr(case_page, "catalog_of", lambda *a, **k: catalog)
    made = write_case_page(run, "btcv/21", tmp_path / "p.html")
    assert "PHANTOM" not in made.path.read_text()


def test_a_ct_of_1_5_mm_stays_below_20_mb(
    run: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """270 x 270 x 300 voxels with the noise of a CT (15 HU in every voxel), two steps."""
    shape = (270, 270, 300)
    rng = np.random.default_rng(5)
    image = rng.normal(40, 15, shape).astype(np.float32)
    image[:40] = -1000
    big = dataclasses.replace(
        volume,
        image=image.astype(np.int16),
        bits=np.kron(rng.integers(0, 9, (27, 27, 30)), np.ones((10, 10, 10))).astype(np.uint16),
        names=volume.names,
    )
    record = RunRecord.read(run)
    known = read_prediction(run / "predictions/step2/btcv_21.npz").structures
    panel = case_page._panel("truth", big.bits, volume.names, known)
    html, levels = case_page._fitting_page(run, record, big, known, [panel] * 3, [], (1, 2))
    assert len(html) < LARGEST_BYTES
    assert levels in GRAY_LEVELS
    assert levels >= 64


def test_fewer_gray_levels_are_still_the_window() -> None:
    image = np.array([[[-1000, -175, 37, 250, 3000]]], dtype=np.int16)
    for levels in GRAY_LEVELS:
        raw = np.frombuffer(gzip.decompress(packed_image(image, (-175, 250), levels)), np.uint8)
        gray = np.cumsum(raw, dtype=np.uint8)
        assert gray.tolist() == [0, 0, round(212 / 425 * (levels - 1)), levels - 1, levels - 1]


def test_more_than_256_combinations_take_two_bytes(volume: Volume) -> None:
    names = [f"s{k}" for k in range(10)]
    bits = np.arange(1024, dtype=np.uint16).reshape(8, 8, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case_page, "paint_order", list)
        panel = case_page._panel("truth", bits, names, names)
    assert panel.wide
    index = np.frombuffer(gzip.decompress(panel.packed), "<u2")
    assert [sum(1 << k for k in panel.patterns[i]) for i in index] == list(range(1024))


# ---------------------------------------------------------------------------------------- refused


def test_unknown_cases_are_named_with_the_nearest(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as err:
        write_case_page(run, "lits/2", tmp_path / "p.html")
    assert "btcv/21, btcv/66, lits/20, lits/21" in str(err.value)
    assert "did you mean 'lits/21'" in str(err.value)
    record = RunRecord.read(run)
    assert find_case(record, "66") == ("btcv", "66")
    with pytest.raises(UnknownName, match="single test case"):  # btcv/21 and lits/21
        find_case(record, "21")
    assert not list(tmp_path.iterdir())


def test_runs_without_predictions_are_refused(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("predictions"))
    with pytest.raises(StoreError, match="keeps no prediction") as err:
        write_case_page(bare, "btcv/21", tmp_path / "p.html")
    assert "--keep-predictions test" in str(err.value)
    (bare / "predictions/step2").mkdir(parents=True)
    shutil.copy(run / "predictions/step2/btcv_21.npz", bare / "predictions/step2")
    made = write_case_page(bare, "btcv/21", tmp_path / "p.html")
    assert "no prediction is stored after step 1" in made.notes
    facts, _ = contents(made.path.read_text())
    assert [p["title"] for p in facts["panels"]] == ["truth", "after step 2"]
    shutil.copy(run / "predictions/step2/lits_20.npz", bare / "predictions/step2/btcv_21.npz")
    with pytest.raises(StoreError, match="not of this case"):
        write_case_page(bare, "btcv/21", tmp_path / "q.html")
    assert not (tmp_path / "q.html").exists()


def test_a_full_disk_leaves_the_old_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "p.html").write_text("old")
    monkeypatch.setattr("clbench.store.files.os.fsync", full)
    with pytest.raises(StoreError, match="page could not be written"):
        write_case_page(run, "btcv/21", tmp_path / "p.html")
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
    assert (tmp_path / "p.html").read_text() == "old"


# -------------------------------------------------------------------------------- in a real browser

PROBE = """
<script>
const wait = () => document.body.dataset.ready ? probe() : setTimeout(wait, 50);
const pixels = k => {
  const c = state.canvases[k], d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return {width: c.width, height: c.height, data: btoa(String.fromCharCode(...d))};
};
const key = k => document.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
const set = (id, value) => {
  const input = document.getElementById(id);
  input.value = value;
  input.dispatchEvent(new Event("input"));
};
function probe() {
  const found = {slices: [state.at[2]], planes: {}};
  key("ArrowUp"); found.slices.push(state.at[2]);
  key("PageDown"); found.slices.push(state.at[2]);
  state.canvases[1].dispatchEvent(new WheelEvent("wheel", {deltaY: -1, cancelable: true}));
  found.slices.push(state.at[2]);
  key("End"); found.slices.push(state.at[2]);
  set("slice", facts.start[2]); found.slices.push(state.at[2]);
  set("opacity", 100);
  for (const button of document.querySelectorAll("#planes button")) {
    button.click();
    found.planes[button.dataset.plane] = [0, 1, 2, 3].map(pixels);
  }
  document.querySelector("#planes button").click();
  set("opacity", 0);
  found.clear = [0, 1, 2, 3].map(pixels);
  set("opacity", 100);
  document.querySelector("#legend th button").click();
  found.none = [0, 1, 2, 3].map(pixels);
  document.querySelectorAll("#legend input")[5].click();
  found.liver = pixels(1);
  const box = state.canvases[1].getBoundingClientRect();
  state.canvases[1].dispatchEvent(new MouseEvent("click", {clientX: box.left + 1, clientY: box.top + 1}));
  found.clicked = state.at;
  found.told = document.getElementById("at").textContent;
  found.wide = document.documentElement.scrollWidth;
  found.window = innerWidth;
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  parent.document.body.append(out);
}
wait();
</script></body>"""


def browser(page: str, folder: Path, *more: str) -> str:
    """The page's DOM after its scripts ran in chromium."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(  # our own page
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=30000",
            *more,
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


def image_of(pixels: dict[str, Any]) -> NDArray[np.uint8]:
    raw = np.frombuffer(base64.b64decode(pixels["data"]), np.uint8)
    return raw.reshape(pixels["height"], pixels["width"], 4)[..., :3]


@needs_browser
def test_a_browser_draws_scrolls_and_toggles(page: str, tmp_path: Path) -> None:
    inner = html_module.escape(page.replace("</body>", PROBE))  # windows are 500 wide at least
    frame = '<iframe style="width: 400px; height: 900px; border: 0" srcdoc="'
    dom = browser(f'<!doctype html><body>{frame}{inner}"></iframe></body>', tmp_path)
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match is not None, dom[-2000:]
    found = json.loads(html_module.unescape(match[1]))
    facts, blobs = contents(page)
    shape, (x, y, z) = facts["shape"], facts["start"]
    low = max(0, min(z + 1, shape[2] - 1) - 10)
    assert found["slices"] == [z, min(z + 1, shape[2] - 1), low, low + 1, shape[2] - 1, z]
    assert found["wide"] <= found["window"] == 400

    colors = np.array([s["color"] for s in facts["structures"]])
    gray = np.cumsum(np.frombuffer(blobs[0], np.uint8).reshape(shape), axis=2, dtype=np.uint8)
    cuts = {"axial": np.s_[:, :, z], "coronal": np.s_[:, y, :], "sagittal": np.s_[x, :, :]}
    colored = 0
    for plane, cut in cuts.items():
        for k in range(4):
            volume = np.repeat(gray[..., None], 3, axis=3)
            for s in range(len(colors) if k else 0):  # later ones lie on earlier ones here
                volume[drawn(facts, blobs[k], k - 1, s)] = colors[s]
            expected = volume[cut][::-1, ::-1].transpose(1, 0, 2)
            np.testing.assert_array_equal(
                image_of(found["planes"][plane][k]), expected, err_msg=f"{plane} {k}"
            )
            colored += int((expected != expected[..., :1]).any(axis=-1).sum())
    assert colored > 100
    bare = image_of(found["clear"][0])
    for k in range(4):
        np.testing.assert_array_equal(image_of(found["clear"][k]), bare)
        np.testing.assert_array_equal(image_of(found["none"][k]), bare)
    liver = drawn(facts, blobs[1], 0, 5)[:, :, z][::-1, ::-1].T
    assert liver.any()
    np.testing.assert_array_equal((image_of(found["liver"]) != bare).any(axis=-1), liver)
    assert found["clicked"] == [shape[0] - 1, shape[1] - 1, z]
    assert re.match(r"voxel \d+, \d+, \d+; (≤ |≥ |about )-?\d+ HU; truth: ", found["told"])


@needs_browser
def test_an_old_browser_is_told_so(page: str, tmp_path: Path) -> None:
    old = page.replace('"use strict";', '"use strict";delete window.DecompressionStream;')
    assert "This browser is too old" in re.sub(
        r"<script.*?</script>", "", browser(old, tmp_path), flags=re.DOTALL
    )
