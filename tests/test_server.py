"""The service over real sockets: answers, limits and refusals."""

from __future__ import annotations

import io
import json
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from models import TINY, random_image, random_model
from PIL import Image
from polygons import fill
from pycocotools import mask as coco

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from local_service import Local
from serving import file_of, jpeg_with_an_odd_tag
from waiting import SECONDS

from sam import Prompt, Sam
from sam.engine import Engine, PromptMasks
from sam.masks import rle
from sam.masks.formats import FORMATS
from sam.server import Settings, answering
from sam.server.app import PAGE
from sam.server.outputs import prompt_masks

IMAGE = random_image(60, 90)
CLICK = [{"points": [[5, 5]]}]
PNG = file_of(IMAGE)
_IMAGE_AS_TEXT = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--\r\n'


@pytest.fixture(scope="module")
def model() -> Sam:
    return random_model(TINY)


@pytest.fixture(scope="module")
def local(model: Sam) -> Iterator[Local]:
    running = Local(Engine(model), Settings())
    yield running
    running.close()


# Answers -----------------------------------------------------------------------------------------------------


def test_segment_an_upload(local: Local, model: Sam) -> None:
    prompts = [{"points": [[5, 6], [40, 30]], "labels": [1, 0]}, {"box": [10, 10, 50, 40]}]
    status, answer, headers = local.post("/v1/segment", PNG, prompts=prompts)
    assert status == 200
    requests = [Prompt([(5, 6), (40, 30)], [1, 0]), Prompt(box=(10, 10, 50, 40))]
    expected = local.engine.segment(IMAGE, requests).result(SECONDS)
    assert answer["image"] == {"height": 60, "width": 90}
    assert answer["request_id"] == headers["x-request-id"]
    assert [prompt["best"] for prompt in answer["prompts"]] == [masks.best for masks in expected]
    for prompt, masks in zip(answer["prompts"], expected, strict=True):
        for record, encoded, score in zip(prompt["masks"], masks.rles, masks.predicted_iou, strict=True):
            mask = rle.decode(encoded)
            np.testing.assert_array_equal(rle.decode(record["segmentation"]), mask)
            assert record["area"] == mask.sum()
            assert record["predicted_iou"] == pytest.approx(float(score), abs=1e-4)
            assert record["bbox"] == coco.toBbox(record["segmentation"]).tolist()


def test_a_box_may_reach_over_the_edges(local: Local) -> None:
    """As in Python, and with the same answer; a point of a box is one too."""
    for box in ([-0.5, -3, 10, 61], [80, 5, 1e6, 5], [90, 60, 300, 300], [-9, -9, 0, 0]):
        status, answer, _ = local.post("/v1/segment", PNG, prompts=[{"box": box}])
        assert status == 200
        (expected,) = local.engine.segment(IMAGE, [Prompt(box=box)]).result(SECONDS)
        result = [record["segmentation"]["counts"] for record in answer["prompts"][0]["masks"]]
        assert result == [rle.compress(one["counts"]) for one in expected.rles]


def test_an_object_score_is_answered_where_the_model_gives_one() -> None:
    encoded = {"size": [2, 3], "counts": [1, 5]}
    answers = [PromptMasks([encoded], np.float32([0.5]), None, score) for score in (-1.5, None)]
    seen, unsaid = prompt_masks(answers, FORMATS["rle"], (2, 3), 99, lambda: None)
    assert seen["object_score"] == -1.5
    assert seen["best"] == 0
    assert "object_score" not in unsaid


def test_outputs_agree(local: Local) -> None:
    _, embedded, _ = local.post("/v1/embed", PNG)
    question = {"embedding": embedded["embedding"], "prompts": CLICK}
    _, answer, _ = local.post("/v1/segment", **question)
    masks = [rle.decode(record["segmentation"]) for record in answer["prompts"][0]["masks"]]
    _, polygons, _ = local.post("/v1/segment", **question, output="polygons")
    for record, mask in zip(polygons["prompts"][0]["masks"], masks, strict=True):
        np.testing.assert_array_equal(fill(record["segmentation"]["coordinates"], mask.shape), mask)
    _, picture, headers = local.post("/v1/segment", **question, output="png")
    assert headers["content-type"] == "image/png"
    assert headers["x-embedding"] == embedded["embedding"]
    best = masks[answer["prompts"][0]["best"]]
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(picture))), best * np.uint8(255))
    _, archive, _ = local.post("/v1/segment", **question, output="npz")
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["masks"], masks)
        assert arrays["predicted_iou"].shape == (1, 3)
    _, labels, _ = local.post("/v1/segment", **{**question, "prompts": CLICK * 2}, output="png")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(labels))), best * np.uint8(2))


def test_automatic(local: Local) -> None:
    options = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    status, answer, _ = local.post("/v1/automatic", PNG, **options)
    assert status == 200
    records = answer["masks"]
    assert records
    for record in records:
        assert rle.decode(record["segmentation"]).sum() == record["area"]
        assert record["bbox"] == coco.toBbox(record["segmentation"]).tolist()
    embedding = answer["embedding"]
    for output, kind in (("png", "image/png"), ("npz", "application/octet-stream"), ("polygons", "application/json")):
        status, _, headers = local.post("/v1/automatic", embedding=embedding, **options, output=output)
        assert (status, headers["content-type"]) == (200, kind)


def test_empty_masks_of_everything_have_no_stability(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN."""
    monkeypatch.setattr(local.engine.model, "mask_threshold", 1e9)
    options = {"points_per_side": 1, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    status, answer, _ = local.post("/v1/automatic", PNG, **options)
    assert status == 200
    assert {record["area"] for record in answer["masks"]} == {0}
    assert {record["stability_score"] for record in answer["masks"]} == {None}


def test_mask_input_by_reference(local: Local) -> None:
    """The logits stay with the service; the answer is that of the same logits given by hand."""
    _, first, _ = local.post("/v1/segment", PNG, prompts=CLICK)
    reference = {"result": first["result"], "prompt": 0, "mask": 2}
    corrected = [{"points": [[5, 5], [50, 50]], "labels": [1, 0], "mask_input": reference}]
    status, second, _ = local.post("/v1/segment", embedding=first["embedding"], prompts=corrected, multimask=False)
    assert status == 200
    (before,) = local.engine.segment(IMAGE, [Prompt([(5, 5)], [1])], keep_logits=True).result(SECONDS)
    assert before.low_res_logits is not None
    prompt = Prompt([(5, 5), (50, 50)], [1, 0], mask_input=before.low_res_logits[2:])
    (by_hand,) = local.engine.segment(IMAGE, [prompt], multimask_output=False).result(SECONDS)
    assert second["prompts"][0]["masks"][0]["segmentation"]["counts"] == rle.compress(by_hand.rles[0]["counts"])

    other = file_of(random_image(60, 90, seed=1))
    assert local.error("/v1/segment", other, prompts=corrected) == (404, "unknown_result")
    for wrong in ({"result": "0" * 32}, {**reference, "prompt": 1}, {**reference, "mask": 3}):
        corrected[0]["mask_input"] = wrong
        status_and_code = local.error("/v1/segment", embedding=first["embedding"], prompts=corrected)
        assert status_and_code == (404, "unknown_result")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats(local: Local, kind: str) -> None:
    assert local.post("/v1/embed", file_of(IMAGE, kind))[0] == 200


def test_upright(local: Local) -> None:
    """Also with a tag that Pillow reads but cannot write."""
    turned = Image.fromarray(IMAGE)
    exif = turned.getexif()
    exif[0x0112] = 6
    for image in (file_of(turned, "JPEG", exif=exif), jpeg_with_an_odd_tag(IMAGE)):
        _, answer, _ = local.post("/v1/embed", image)
        assert answer["image"] == {"height": 90, "width": 60}


def test_health_model_and_metrics(local: Local, model: Sam) -> None:
    assert local.request("GET", "/v2/health/live")[::2] == (200, b'{"live":true}')
    assert local.request("GET", "/v2/health/ready")[::2] == (200, b'{"ready":true}')
    _, _, text = local.request("GET", "/v2/models/custom")
    assert json.loads(text)["versions"] == [model.model_hash]
    assert local.request("GET", "/v2/models/other")[0] == 404
    local.post("/v1/embed", PNG)
    text = local.request("GET", "/metrics")[2].decode()
    for name in ('sam_requests_total{route="/v1/embed",status="200"}', "sam_ready 1.0", "sam_engine_accepted_total"):
        assert name in text


def test_openapi_has_every_route_with_examples(local: Local) -> None:
    document = json.loads(local.request("GET", "/openapi.json")[2])
    assert {path for path in document["paths"] if not path.startswith("/v1/video/")} == {
        "/v1/embed", "/v1/segment", "/v1/automatic", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}",
        "/metrics",
    }  # fmt: skip
    for path in ("/v1/segment", "/v1/automatic"):
        post = document["paths"][path]["post"]
        assert post["requestBody"]["content"]["application/json"]["example"]
        assert post["responses"]["200"]["content"]["application/json"]["example"]
        assert post["responses"]["503"]


def test_the_page_needs_nothing_from_elsewhere(local: Local) -> None:
    for path, _ in PAGE:
        status, headers, text = local.request("GET", path)
        assert status == 200
        assert "default-src 'self'" in headers["content-security-policy"]
        assert b"http://" not in text
        assert b"https://" not in text


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"prompts": []}, 422, "invalid_request"),
        ({"prompts": CLICK * 1025}, 422, "invalid_request"),
        ({"prompts": [{"points": [[1, 1]] * 65}]}, 422, "invalid_request"),
        ({"prompts": [{}]}, 422, "invalid_request"),
        ({"prompts": [{"points": [[1, 1]], "labels": [1, 0]}]}, 422, "invalid_request"),
        ({"prompts": [{"box": [1, 1, 9, 9], "labels": []}]}, 422, "invalid_request"),
        ({"prompts": [{"points": [[1, 1]], "labels": [True]}]}, 422, "invalid_request"),
        ({"prompts": [{"points": [["1", 1]]}]}, 422, "invalid_request"),
        ({"prompts": [{"points": [[1, 1, 1]]}]}, 422, "invalid_request"),
        ({"prompts": [{"points": [[1, -1]]}]}, 422, "invalid_request"),
        ({"prompts": '[{"points": [[1, NaN]]}]'}, 422, "invalid_request"),
        ({"prompts": '[{"points": [[1, 1e999]]}]'}, 422, "invalid_request"),
        ({"prompts": "[" * 100_000}, 422, "invalid_request"),
        ({"prompts": [{"points": [[91, 1]]}]}, 422, "out_of_image"),
        ({"prompts": [{"points": [[1, 61]]}]}, 422, "out_of_image"),
        ({"prompts": [{"box": [91, 0, 200, 60]}]}, 422, "out_of_image"),
        ({"prompts": [{"box": [0, 61, 90, 61]}]}, 422, "out_of_image"),
        ({"prompts": [{"box": [-9, 0, -1, 60]}]}, 422, "out_of_image"),
        ({"prompts": [{"points": [[1, 1]], "box": [0, -9, 90, -0.5]}]}, 422, "out_of_image"),
        ({"prompts": [{"box": [10, 0, 9, 61]}]}, 422, "invalid_request"),
        ({"prompts": [{"box": [0, 61, 10, 60]}]}, 422, "invalid_request"),
        ({"prompts": [{"box": [0, 0, 10, 1e31]}]}, 422, "invalid_request"),
        ({"prompts": CLICK, "output": "pickle"}, 422, "invalid_request"),
        ({"prompts": CLICK, "multimask": 1}, 422, "invalid_request"),
        ({"prompts": CLICK, "path": "/etc/passwd"}, 422, "invalid_request"),
        ({"prompts": CLICK, "embedding": "0" * 32}, 422, "invalid_request"),
    ],
)
def test_bad_prompts(local: Local, fields: dict[str, Any], status: int, code: str) -> None:
    assert local.error("/v1/segment", PNG, **fields) == (status, code)


def test_errors_say_where_and_echo_nothing(local: Local) -> None:
    _, answer, _ = local.post("/v1/segment", PNG, prompts=[*CLICK, {"box": [1, 2, "<secret>", 4]}])
    assert answer["error"]["where"] == ["prompts", 1, "box", 2]
    _, answer, _ = local.post("/v1/segment", PNG, prompts=[*CLICK, {"box": [9, 2, 8, 4]}])
    assert answer["error"]["where"] == ["prompts", 1, "box"]
    _, answer, _ = local.post("/v1/segment", PNG, prompts=[*CLICK, {"box": [91, 2, 95, 4]}])
    assert answer["error"]["where"] == ["prompts", 1, "box"]
    assert answer["error"]["message"] == "A point or a whole box lies outside the image."
    _, answer, _ = local.post("/v1/segment", PNG, prompts=CLICK, secret=1)
    assert answer["error"]["where"] == ["?"]
    assert "secret" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"", 415, "unsupported_image"),
        (b"not a picture", 415, "unsupported_image"),
        (file_of(IMAGE, "GIF"), 415, "unsupported_image"),
        (file_of(IMAGE, "BMP"), 415, "unsupported_image"),
        (file_of(np.zeros((9, 9), np.uint16)), 415, "unsupported_image"),
        (PNG[:200], 422, "bad_image"),
        (PNG[:300] + bytes(100) + PNG[400:], 422, "bad_image"),
        (file_of(Image.new("1", (1, 4000))), 422, "bad_image"),
        (file_of(Image.new("1", (9000, 6000))), 413, "image_too_large"),
        (file_of(Image.new("1", (20000, 10000))), 413, "image_too_large"),
    ],
)
def test_bad_images(local: Local, image: bytes, status: int, code: str) -> None:
    assert local.error("/v1/embed", image) == (status, code)


def test_a_jpeg_of_very_many_scans_is_refused(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred bytes a scan, and each a pass over all pixels: hours for a small file."""
    data = file_of(IMAGE, "JPEG", progressive=True)
    assert local.post("/v1/embed", data)[0] == 200
    last_scan = data[data.rfind(b"\xff\xc4") : -2]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert local.error("/v1/embed", data[:-2] + last_scan * 100 + data[-2:]) == (422, "bad_image")


def test_large_json_does_not_keep_others_waiting(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health answers while a large document is read and its values are checked."""
    read, reading, answered = answering.read_text, threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        reading.set()
        assert answered.wait(SECONDS), "nobody else was answered meanwhile"
        return read(*arguments)

    _, embedded, _ = local.post("/v1/embed", PNG)
    monkeypatch.setattr(answering, "read_text", held)
    prompts = [{"points": [[1, 1]] * 64, "labels": [1] * 64}] * 256
    body = json.dumps({"embedding": embedded["embedding"], "prompts": [*prompts, {}]}).encode()
    with ThreadPoolExecutor(1) as pool:
        requests = pool.submit(local.request, "POST", "/v1/segment", body, {"Content-Type": "application/json"})
        assert reading.wait(SECONDS)
        assert local.request("GET", "/v2/health/live")[0] == 200
        answered.set()
        assert requests.result(SECONDS)[0] == 422


def test_bombs_are_refused_by_their_header(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of very many pixels is never decoded."""
    size = b"\0\0\x80\0" * 2  # 32768 x 32768
    header = b"IHDR" + size + b"\x08\x02\0\0\0"
    bomb = PNG[:8] + b"\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert local.error("/v1/embed", bomb) == (413, "image_too_large")


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "bad_request"),
        (b"[]", "application/json", 422, "invalid_request"),
        (b"\xff\xfe", "application/json", 400, "bad_request"),
        (b"[" * 60_000, "application/json", 400, "bad_request"),
        (b"[" * 1_000_000, "application/json", 422, "invalid_request"),
        (b"9" * 10_000, "application/json", 400, "bad_request"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"x", "multipart/form-data", 400, "bad_request"),
        (b"x", "multipart/form-data; boundary=b", 400, "bad_request"),
        (b"--b\r\n\r\n\r\n--b--", "multipart/form-data; boundary=b", 400, "bad_request"),
        (_IMAGE_AS_TEXT, "multipart/form-data; boundary=b", 400, "bad_request"),
    ],
)
def test_bad_bodies(local: Local, body: bytes, kind: str, status: int, code: str) -> None:
    answered, _, text = local.request("POST", "/v1/segment", body, {"Content-Type": kind})
    assert (answered, json.loads(text)["error"]["code"]) == (status, code)


def test_compressed_bodies_are_refused(local: Local) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    status, _, text = local.request("POST", "/v1/segment", b"x", headers)
    assert (status, json.loads(text)["error"]["code"]) == (415, "unsupported_media_type")


def test_unknown_paths_and_methods(local: Local) -> None:
    for method, path, code in (
        ("GET", "/v1/nothing", "not_found"),
        ("GET", "/v1/segment", "method_not_allowed"),
        ("GET", "/docs", "not_found"),
        ("GET", "/../../etc/passwd", "not_found"),
    ):
        assert json.loads(local.request(method, path)[2])["error"]["code"] == code


def test_unknown_embedding(local: Local) -> None:
    assert local.error("/v1/segment", embedding="0" * 32, prompts=CLICK) == (404, "unknown_embedding")
    assert local.error("/v1/segment", embedding="../../x", prompts=CLICK) == (422, "invalid_request")


def test_request_ids(local: Local) -> None:
    assert local.request("GET", "/", headers={"X-Request-ID": "mine-1"})[1]["x-request-id"] == "mine-1"
    assert local.request("GET", "/", headers={"X-Request-ID": "<b>"})[1]["x-request-id"] != "<b>"


def test_a_mistake_of_ours_is_500_without_its_text(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam.server.app.decode_image", lambda *arguments: 1 / 0)
    status, answer, _ = local.post("/v1/embed", PNG)
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "division" not in json.dumps(answer)


@pytest.mark.parametrize("place", ["sam.server.app.decode_image", "PIL.Image.Image.crop", "PIL.Image.Image.load"])
def test_no_memory_for_an_upload(local: Local, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def out_of_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(place, out_of_memory)
    assert local.error("/v1/embed", PNG) == (503, "out_of_memory")


def test_other_sites_are_refused(local: Local) -> None:
    """A page elsewhere cannot use the visitor's browser, under a name that leads here neither."""
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:8000"}):
        assert local.request("GET", "/", headers=headers)[0] == 403
    assert local.request("POST", "/v1/embed", b"", {"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert local.request("POST", "/v1/embed", b"", {"Sec-Fetch-Site": "same-origin"})[0] == 415
    assert local.request("GET", "/", headers={"Host": "localhost:99"})[0] == 200
